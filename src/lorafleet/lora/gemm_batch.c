/* Many small matrix products in one call: C = alpha·op(A)·op(B) + beta·C, in groups of equal sizes.

   Arguments are those of oneMKL's sgemm_batch in Fortran's order. Seen from C, where a row's numbers lie side by side,
   such a product is C = alpha·L·R + beta·C with L = op(B) of n rows and R = op(A) of m columns.

   Every number of C is summed up by one thread, in an order that follows from k alone: a row gives the same to the bit
   whatever stands beside it. */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { W = 16, TALL = 8, WIDE = 3, ACROSS = 6 }; /* numbers in a register; tiles that fill 32 of them */
#else
enum { W = 8, TALL = 4, WIDE = 3, ACROSS = 3 }; /* and 16 */
#endif
enum { ROWS = 4, SHORT = 128 }; /* rows of a tile of dot products, and numbers in one that is short */
#define EVERY(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int64_t i64;

typedef struct {
    i64 n, m, k, l_row, l_col, r_row, r_col, c_row;
    float alpha, beta;
} Sizes;

INLINE float sum(vec x)
{
    float part[W];
    memcpy(part, &x, sizeof part);
    for (int half = W / 2; half; half /= 2)
        EVERY(i, half) part[i] += part[i + half];
    return part[0];
}

INLINE void put(const Sizes *s, float *c, float x)
{
    *c = s->beta ? s->alpha * x + s->beta * *c : s->alpha * x;
}

/* A tile of C whose numbers are dot products: rows of L and columns of R lie side by side in memory. */
INLINE void dots(const Sizes *s, const float *l, const float *r, float *c, const int rows, const int columns)
{
    vec acc[ROWS][ACROSS] = {};
    i64 p = 0;
    for (; p + W <= s->k; p += W) {
        vec right[ACROSS];
        EVERY(j, columns) right[j] = *(const vec *)(r + j * s->r_col + p);
        EVERY(i, rows) {
            vec left = *(const vec *)(l + i * s->l_row + p);
            EVERY(j, columns) acc[i][j] += left * right[j];
        }
    }
    EVERY(i, rows) EVERY(j, columns) {
        float x = sum(acc[i][j]);
        for (i64 q = p; q < s->k; q++)
            x += l[i * s->l_row + q] * r[j * s->r_col + q];
        put(s, c + i * s->c_row + j, x);
    }
}

/* A tile of C, `valid` of whose columns are wanted: rows of R lie side by side in memory, r_row apart. */
INLINE void lines(const Sizes *s, const float *l, const float *r, i64 r_row, float *c, const int rows,
                  const int columns, i64 valid)
{
    vec acc[TALL][WIDE] = {};
    for (i64 p = 0; p < s->k; p++) {
        vec right[WIDE];
        EVERY(j, columns) right[j] = *(const vec *)(r + p * r_row + j * W);
        EVERY(i, rows) {
            float left = l[i * s->l_row + p * s->l_col];
            EVERY(j, columns) acc[i][j] += left * right[j];
        }
    }
    EVERY(i, rows) EVERY(j, columns) {
        float *to = c + i * s->c_row + j * W;
        if (valid >= (j + 1) * W) {
            *(vec *)to = s->beta ? s->alpha * acc[i][j] + s->beta * *(vec *)to : s->alpha * acc[i][j];
        } else {
            float part[W];
            memcpy(part, &acc[i][j], sizeof part);
            for (i64 q = 0; q < valid - j * W; q++)
                put(s, to + q, part[q]);
        }
    }
}

/* Any numbers of C, from column `from` on, wherever the others lie: what the tiles above leave. */
INLINE void each(const Sizes *s, const float *l, const float *r, float *c, i64 rows, i64 from)
{
    for (i64 i = 0; i < rows; i++)
        for (i64 j = from; j < s->m; j++) {
            float x = 0;
            for (i64 p = 0; p < s->k; p++)
                x += l[i * s->l_row + p * s->l_col] * r[p * s->r_row + j * s->r_col];
            put(s, c + i * s->c_row + j, x);
        }
}

INLINE void dot_rows(const Sizes *s, const float *l, const float *r, float *c, const int rows)
{
    i64 j = 0;
    for (; j + ACROSS <= s->m; j += ACROSS)
        dots(s, l, r + j * s->r_col, c + j, rows, ACROSS);
    for (; j < s->m; j++)
        dots(s, l, r + j * s->r_col, c + j, rows, 1);
}

INLINE void line_rows(const Sizes *s, const float *l, const float *r, float *c, const int rows)
{
    i64 j = 0;
    for (; j + WIDE * W <= s->m; j += WIDE * W)
        lines(s, l, r + j, s->r_row, c + j, rows, WIDE, WIDE * W);
    for (; j + W <= s->m; j += W)
        lines(s, l, r + j, s->r_row, c + j, rows, 1, W);
    each(s, l, r, c, rows, j);
}

/* Dot products too short to be summed up across a register: columns of R become rows of a buffer. */
static void short_dots(const Sizes *s, const float *l, const float *r, float *c)
{
    float rows[SHORT][WIDE * W];
    for (i64 j = 0; j < s->m; j += WIDE * W) {
        const i64 valid = s->m - j < WIDE * W ? s->m - j : WIDE * W;
        memset(rows, 0, sizeof rows);
        for (i64 q = 0; q < valid; q++)
            for (i64 p = 0; p < s->k; p++)
                rows[p][q] = r[(j + q) * s->r_col + p];
        const float *packed = rows[0];
        i64 i = 0;
#define LINES(height, columns) \
    for (; i + (height) <= s->n; i += (height)) \
        lines(s, l + i * s->l_row, packed, WIDE * W, c + i * s->c_row + j, height, columns, valid);
        if (valid > W) {
            LINES(TALL, WIDE)
            LINES(1, WIDE)
        } else {
            LINES(TALL, 1)
            LINES(1, 1)
        }
    }
}

static void product(const Sizes *s, const float *l, const float *r, float *c)
{
    i64 i = 0;
    if (s->r_col == 1) {
        for (; i + TALL <= s->n; i += TALL)
            line_rows(s, l + i * s->l_row, r, c + i * s->c_row, TALL);
        for (; i + TALL / 2 <= s->n; i += TALL / 2)
            line_rows(s, l + i * s->l_row, r, c + i * s->c_row, TALL / 2);
        for (; i < s->n; i++)
            line_rows(s, l + i * s->l_row, r, c + i * s->c_row, 1);
    } else if (s->k <= SHORT) {
        short_dots(s, l, r, c);
    } else if (s->l_col == 1) {
        for (; i + ROWS <= s->n; i += ROWS)
            dot_rows(s, l + i * s->l_row, r, c + i * s->c_row, ROWS);
        for (; i < s->n; i++)
            dot_rows(s, l + i * s->l_row, r, c + i * s->c_row, 1);
    } else
        each(s, l, r, c, s->n, 0);
}

void sgemm_batch_64(const char *a_letter, const char *b_letter, const i64 *m, const i64 *n, const i64 *k,
                    const float *alpha, const float **a, const i64 *a_next, const float **b, const i64 *b_next,
                    const float *beta, float **c, const i64 *c_next, const i64 *groups, const i64 *counts)
{
    i64 products = 0;
    double work = 0;
    for (i64 g = 0; g < *groups; g++) {
        products += counts[g];
        work += (double)counts[g] * m[g] * n[g] * k[g];
    }
#pragma omp parallel if (work > 30000 && products > 1)
    {
        i64 first = 0;
        for (i64 g = 0; g < *groups; first += counts[g++]) {
            const int flat = a_letter[g] == 'N', up = b_letter[g] == 'N';
            const Sizes s = {n[g], m[g], k[g], up ? b_next[g] : 1, up ? 1 : b_next[g], flat ? a_next[g] : 1,
                             flat ? 1 : a_next[g], c_next[g], alpha[g], beta[g]};
#pragma omp for schedule(dynamic) nowait
            for (i64 i = first; i < first + counts[g]; i++)
                product(&s, b[i], a[i], c[i]);
        }
    }
}
