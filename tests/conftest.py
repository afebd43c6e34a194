"""One thread for the tests and what they start: on tiny tensors a second thread costs more than it does."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
