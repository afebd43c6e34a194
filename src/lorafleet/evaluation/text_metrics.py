"""How near generated texts come to their references: BLEU and chrF by sacrebleu, ROUGE-L by rouge-score."""

import re
from collections.abc import Sequence

from sacrebleu.metrics import BLEU, CHRF

# Chinese characters, kana and hangul, which are written without spaces: each is a word of its own.
_CHARACTER = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})[^\W_])+")


class _Words:
    """The words that ROUGE compares. rouge-score's own tokenizer drops every letter outside a to z."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words and single CJK characters."""
        return _WORD.findall(text.lower())


def text_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002), chrF (Popović 2015) and ROUGE-L (Lin 2004), each from 0 to 100.

    Args:
        texts: One generated text for each row.
        references: What each row's text may be; rows may have different numbers of them.

    Returns:
        ``bleu`` of the whole corpus, by sacrebleu's defaults (its ``zh`` tokenizer where a reference has CJK
        characters, else ``13a``); ``chrf`` of the whole corpus; ``rouge_l``, the mean over rows of the best F1.
    """
    streams = reference_streams(references)
    best = rouge_l(texts, references)
    scores = {name: metric.corpus_score(texts, streams).score for name, metric in corpus_metrics(references).items()}
    return {**scores, "rouge_l": sum(best) / len(best)}


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L of each row, from 0 to 100: the F1 of the reference that it comes nearest to."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: seconds

    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        100 * float(rouge.score_multi(list(several), text)["rougeL"].fmeasure)
        for text, several in zip(texts, references, strict=True)
    ]


def corpus_metrics(references: Sequence[Sequence[str]]) -> dict[str, BLEU | CHRF]:
    """Metrics of a whole corpus by sacrebleu, BLEU with the tokenizer that these references want."""
    cjk = any(re.search(_CHARACTER, text) for several in references for text in several)
    return {"bleu": BLEU(tokenize="zh" if cjk else "13a"), "chrf": CHRF()}


def reference_streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """The references as sacrebleu takes them: the first of every row, the second of every row, and so on."""
    most = max(len(several) for several in references)
    return [[several[i] if i < len(several) else None for several in references] for i in range(most)]
