/* Products with a weight, and attention over a cache, for a few rows in bf16 on a CPU. See
   few_rows.py for the formulas.

   Both are bound by reading memory, weights and keys, which is done once and in order. A row's
   numbers do not depend on how many rows there are. Sums are in fp32. */

#ifndef __AVX512F__
#error "without AVX-512 torch's kernels are faster"
#endif
/* gcc takes half of the width by default. */
#ifndef __clang__
#pragma GCC target("prefer-vector-width=512")
#endif

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef uint16_t half;
typedef float wide __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef half halves __attribute__((vector_size(2 * LANES), aligned(2)));

INLINE half rounded(float value) {
    uint32_t number;
    memcpy(&number, &value, 4);
    uint32_t nearest = (number + 0x7fff + (number >> 16 & 1)) >> 16;
    return (number & 0x7fffffff) > 0x7f800000 ? (half)(number >> 16 | 64) : (half)nearest;
}

INLINE wide widened(const half *from) {
    return (wide)(__builtin_convertvector(*(const halves *)from, bits) << 16);
}

/* sum + the products of 2 LANES numbers, each lane with two of them. */
INLINE wide multiplied(wide sum, bits a, bits b) {
#ifdef __AVX512BF16__
    return (wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    const bits high = (bits){} + 0xffff0000u;
    return sum + (wide)(a << 16) * (wide)(b << 16) + (wide)(a & high) * (wide)(b & high);
#endif
}

/* y (N rows, stride `out`) from `first` to `first` + R: R rows of w for N rows of x. Its sums stay in
   registers, as N and R are constants. */
INLINE void tile(const half *x, const half *w, half *y, int64_t in, int64_t out, const int N,
                 const int R) {
    wide sums[8][8];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
            sums[r][i] = (wide){0};
    for (int64_t j = 0; j < in; j += 2 * LANES) {
        bits rows[8];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            rows[r] = *(const bits *)(w + r * in + j);
            __builtin_prefetch(w + (r + R) * in + j);
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const bits one = *(const bits *)(x + i * in + j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                sums[r][i] = multiplied(sums[r][i], one, rows[r]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            y[i * out + r] = rounded(_mm512_reduce_add_ps((__m512)sums[r][i]));
}

/* Each with as many rows of w as keep the sums in 32 registers. */
#define TILES(N, R)                                                                               \
    static void tiles_##N(const half *x, const half *w, half *y, int64_t in, int64_t out,         \
                          int64_t rows) {                                                         \
        int64_t o = 0;                                                                            \
        for (; o + R <= rows; o += R)                                                             \
            tile(x, w + o * in, y + o, in, out, N, R);                                            \
        for (; o < rows; o++)                                                                     \
            tile(x, w + o * in, y + o, in, out, N, 1);                                            \
    }
TILES(1, 8)
TILES(2, 8)
TILES(3, 4)
TILES(4, 4)
TILES(5, 4)
TILES(6, 4)

#define BLOCK 16 /* rows of w that stay in the nearest cache, if there are more than 6 rows of x */

/* y (n, out) = x (n, in) w' with w (out, in); in is a multiple of 2 LANES. Computes the rows `from`
   to `to` of w. */
void product(const half *x, const half *w, half *y, int64_t n, int64_t in, int64_t out,
             int64_t from, int64_t to) {
    static void (*const by_count[])(const half *, const half *, half *, int64_t, int64_t,
                                    int64_t) = {tiles_1, tiles_2, tiles_3,
                                                tiles_4, tiles_5, tiles_6};
    for (int64_t o = from; o < to; o += BLOCK) {
        const int64_t rows = to - o < BLOCK ? to - o : BLOCK;
        for (int64_t i = 0; i < n;) {
            const int64_t left = n - i, count = left <= 6 ? left : left < 12 ? (left + 1) / 2 : 6;
            by_count[count - 1](x + i * in, w + o * in, y + i * out + o, in, out, rows);
            i += count;
        }
    }
}

/* As in elementwise.c, for x up to 0. A copy: the digest of one file names its library. */
INLINE float exponential(float x) {
    float within = x < -87.0f ? -87.0f : x;
    float n = within * 1.44269504089f + 12582912.0f;
    uint32_t number;
    memcpy(&number, &n, 4);
    number = (number + 127) << 23;
    n -= 12582912.0f;
    float r = within - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    float scale;
    memcpy(&scale, &number, 4);
    return x < -87.0f ? 0.0f : y * scale;
}

/* scores (4, T) of four rows of q (4, d) with LANES keys, which are columns of k (d, LANES). */
INLINE void scored(const float *q, const wide *k, float *scores, int64_t T, int64_t d) {
    wide sums[4] = {{0}};
    for (int64_t c = 0; c < d; c++)
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            sums[r] += q[r * d + c] * k[c];
    for (int r = 0; r < 4; r++)
        *(wide *)(scores + r * T) = sums[r];
}

INLINE void normalised(float *scores, int64_t T) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < T; t++)
        most = scores[t] > most ? scores[t] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < T; t++) {
        float e = exponential(scores[t] - most);
        scores[t] = e;
        sum += e;
    }
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t t = 0; t < T; t++)
        scores[t] *= scale;
}

/* 2 LANES columns of four rows of weights (4, T) times v. */
INLINE void averaged(const float *weights, const half *v, int64_t step, int64_t count, int64_t T,
                     float *result, const int parts) {
    wide sums[4][2] = {{{0}}};
    for (int64_t t = 0; t < count; t++) {
        wide one[2];
#pragma GCC unroll 2
        for (int c = 0; c < parts; c++)
            one[c] = widened(v + t * step + c * LANES);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
#pragma GCC unroll 2
            for (int c = 0; c < parts; c++)
                sums[r][c] += weights[r * T + t] * one[c];
    }
    memcpy(result, sums, sizeof sums);
}

/* What a mask says about a key is added to its score: bf16 numbers, or with 1 for a key that is seen. */
INLINE void masked(float *scores, const char *mask, int64_t count, int64_t T, int kind) {
    if (kind == 1)
        for (int64_t t = 0; t < count; t++) {
            uint32_t number = (uint32_t)((const half *)mask)[t] << 16;
            float added;
            memcpy(&added, &number, 4);
            scores[t] += added;
        }
    if (kind == 2)
        for (int64_t t = 0; t < count; t++)
            scores[t] = mask[t] ? scores[t] : -INFINITY;
    for (int64_t t = count; t < T; t++)
        scores[t] = -INFINITY;
}

/* Steps in numbers, from sequence to sequence, head to head and row to row. */
typedef struct {
    int64_t sequence, head, row;
} steps;

typedef struct {
    int64_t B, H, G, n, count, d, kind; /* kind of mask: 0 none, 1 added, 2 seen */
    steps mask, q, k, v;
} shape;

/* The weights (rows, T) of one sequence and one head of keys; rows are those of the heads that share
   it, for the first place, then for the second. */
INLINE void weighted(const half *q, const half *k, const char *mask, const shape *s, int64_t g,
                     int64_t T, float scale, float *queries, float *scores, wide *columns) {
    const int64_t groups = s->H / s->G, rows = groups * s->n, padded = (rows + 3) / 4 * 4, d = s->d;
    for (int64_t row = 0; row < padded; row++) {
        const half *from = q + (g * groups + row % groups) * s->q.head + row / groups * s->q.row;
        for (int64_t c = 0; c < d; c += LANES)
            *(wide *)(queries + row * d + c) = row < rows ? widened(from + c) * scale : (wide){0};
    }
    for (int64_t t = 0; t < T; t += LANES) {
        for (int64_t i = 0; i < LANES; i++)
            for (int64_t c = 0; c < d; c++) {
                uint32_t number = t + i < s->count ? (uint32_t)k[(t + i) * s->k.row + c] << 16 : 0;
                memcpy((float *)columns + c * LANES + i, &number, 4);
            }
        for (int64_t row = 0; row < padded; row += 4)
            scored(queries + row * d, columns, scores + row * T + t, T, d);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t size = s->kind == 1 ? 2 : 1;
        masked(scores + row * T, mask + row / groups * s->mask.row * size, s->count, T, s->kind);
        normalised(scores + row * T, T);
    }
}

/* out (B, n, H, d) of q (B, H, n, d), keys and values (B, G, count, d), and a mask (B, n, count).
   scratch has room for (d + T) (n H / G + 3) + d LANES numbers, with T the count up to a multiple of
   LANES. */
void attended(const half *q, const half *k, const half *v, const char *mask, half *out,
              const shape *s, float scale, float *scratch) {
    const int64_t d = s->d, groups = s->H / s->G, rows = groups * s->n, padded = (rows + 3) / 4 * 4;
    const int64_t T = (s->count + LANES - 1) / LANES * LANES;
    float *queries = scratch, *scores = queries + padded * d;
    wide *columns = (wide *)(scores + padded * T);
    for (int64_t item = 0; item < s->B * s->G; item++) {
        const int64_t b = item / s->G, g = item % s->G;
        const half *values = v + b * s->v.sequence + g * s->v.head;
        const char *seen = mask + b * s->mask.sequence * (s->kind == 1 ? 2 : 1);
        weighted(q + b * s->q.sequence, k + b * s->k.sequence + g * s->k.head, seen, s, g, T, scale,
                 queries, scores, columns);
        for (int64_t row = 0; row < rows; row += 4)
            for (int64_t c = 0; c < d; c += 2 * LANES) {
                float result[4][2 * LANES];
                const float *weights = scores + row * T;
                if (c + LANES < d)
                    averaged(weights, values + c, s->v.row, s->count, T, *result, 2);
                else
                    averaged(weights, values + c, s->v.row, s->count, T, *result, 1);
                for (int64_t i = row; i < row + 4 && i < rows; i++) {
                    const int64_t place = b * s->n + i / groups, head = g * groups + i % groups;
                    half *to = out + (place * s->H + head) * d + c;
                    for (int64_t j = 0; j < 2 * LANES && c + j < d; j++)
                        to[j] = rounded(result[i - row][j]);
                }
            }
    }
}

typedef void norm_function(const half *, const half *, half *, float *, int64_t, int64_t, float);
typedef void gate_function(const half *, const half *, half *, int64_t);
typedef void rotate_function(const half *, const half *, const half *, half *, int64_t, int64_t,
                             const int64_t *, int64_t);

/* b a x: a (rank, in), b (out, rank), and rank is a multiple of 2 LANES. */
typedef struct {
    const half *a, *b;
    int64_t rank;
} low_rank;

/* A decoder layer: its weights, its sizes, and elementwise.c's functions. `low` is NULL, or has a
   product (a of NULL for none) of each of q, k, v, o, gate, up and down, which is added to the last
   `changed` rows of each sequence. */
typedef struct {
    const half *input_norm, *q, *k, *v, *o, *post_norm, *gate, *up, *down;
    const low_rank *low;
    int64_t changed, hidden, inner;
    norm_function *norm;
    gate_function *gated;
    rotate_function *rotated;
    float input_eps, post_eps, scale;
} layer_parts;

INLINE void added(const half *a, const half *b, half *sum, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        uint32_t one = (uint32_t)a[i] << 16, two = (uint32_t)b[i] << 16;
        float x, y;
        memcpy(&x, &one, 4);
        memcpy(&y, &two, 4);
        sum[i] = rounded(x + y);
    }
}

/* The next `count` numbers of a buffer, as whole lines of the cache. */
INLINE half *taken(half **buffer, int64_t count) {
    half *own = *buffer;
    *buffer += (count + 31) / 32 * 32;
    return own;
}

/* y + b a x of the rows that a low-rank product changes. `buffer` has room for (rank + out) numbers
   of each of the last rows of a sequence, and 32 more. */
static void corrected(const layer_parts *w, int i, const half *x, half *y, int64_t in, int64_t out,
                      const shape *s, half *buffer) {
    if (w->low == NULL || w->low[i].a == NULL)
        return;
    const low_rank *one = w->low + i;
    half *middle = taken(&buffer, w->changed * one->rank);
    for (int64_t b = 0; b < s->B; b++) {
        const int64_t first = (b + 1) * s->n - w->changed;
        half *to = y + first * out;
        product(x + first * in, one->a, middle, w->changed, in, one->rank, 0, one->rank);
        product(middle, one->b, buffer, w->changed, one->rank, out, 0, out);
        added(buffer, to, to, w->changed * out);
    }
}

/* y (B, n, hidden) of x. cosine and sine are (1 or B, n, d), with `turn` from sequence to sequence.
   New keys and values are written to the last n of the s->count entries. `numbers` has room for what
   layer() takes, scratch for attended(). */
void layer(const layer_parts *w, const half *x, half *y, const half *cosine, const half *sine,
           int64_t turn, half *keys, half *values, const char *mask, const shape *s,
           half *numbers, float *scratch) {
    const int64_t n = s->n, rows = s->B * n, d = s->d, wide_q = s->H * d, wide_k = s->G * d;
    half *a = taken(&numbers, rows * w->hidden), *b = taken(&numbers, rows * w->hidden);
    half *q = taken(&numbers, rows * wide_q), *turned = taken(&numbers, rows * wide_q);
    half *k = taken(&numbers, rows * wide_k), *v = taken(&numbers, rows * wide_k);
    half *new_k = taken(&numbers, rows * wide_k), *seen = taken(&numbers, rows * wide_q);
    half *gate = taken(&numbers, rows * w->inner), *up = taken(&numbers, rows * w->inner);
    half *more = numbers; /* for corrected() */
    w->norm(x, w->input_norm, a, scratch, rows, w->hidden, w->input_eps);
    product(a, w->q, q, rows, w->hidden, wide_q, 0, wide_q);
    corrected(w, 0, a, q, w->hidden, wide_q, s, more);
    product(a, w->k, k, rows, w->hidden, wide_k, 0, wide_k);
    corrected(w, 1, a, k, w->hidden, wide_k, s, more);
    product(a, w->v, v, rows, w->hidden, wide_k, 0, wide_k);
    corrected(w, 2, a, v, w->hidden, wide_k, s, more);
    const int64_t of_q[] = {s->H, n, d, n * wide_q, d, wide_q, turn};
    const int64_t of_k[] = {s->G, n, d, n * wide_k, d, wide_k, turn};
    w->rotated(q, cosine, sine, turned, 0, rows, of_q, 0);
    w->rotated(k, cosine, sine, new_k, 0, rows, of_k, 0);
    for (int64_t i = 0; i < rows * s->G; i++) {
        const int64_t row = i / s->G, g = i % s->G, at = s->count - n + row % n;
        const int64_t to_k = row / n * s->k.sequence + g * s->k.head + at * s->k.row;
        const int64_t to_v = row / n * s->v.sequence + g * s->v.head + at * s->v.row;
        memcpy(keys + to_k, new_k + i * d, d * sizeof(half));
        memcpy(values + to_v, v + i * d, d * sizeof(half));
    }
    shape own = *s;
    own.q = (steps){n * wide_q, d, wide_q};
    attended(turned, keys, values, mask, seen, &own, w->scale, scratch);
    product(seen, w->o, a, rows, wide_q, w->hidden, 0, w->hidden);
    corrected(w, 3, seen, a, wide_q, w->hidden, s, more);
    added(a, x, a, rows * w->hidden);
    w->norm(a, w->post_norm, b, scratch, rows, w->hidden, w->post_eps);
    product(b, w->gate, gate, rows, w->hidden, w->inner, 0, w->inner);
    corrected(w, 4, b, gate, w->hidden, w->inner, s, more);
    product(b, w->up, up, rows, w->hidden, w->inner, 0, w->inner);
    corrected(w, 5, b, up, w->hidden, w->inner, s, more);
    w->gated(gate, up, gate, rows * w->inner);
    product(gate, w->down, b, rows, w->inner, w->hidden, 0, w->hidden);
    corrected(w, 6, gate, b, w->inner, w->hidden, s, more);
    added(b, a, y, rows * w->hidden);
}
