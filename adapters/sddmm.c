/* The sampled product of sddmm.py on a CPU:  out_j += sum over tokens of dy[t, row_j] x[t, col_j].

   A dot product runs along the tokens, but dy and x are stored along the features. So one tile of
   tokens at a time is transposed. It is small enough that the dot products read it from a core's L2
   cache; transposing the full matrices in memory costs more than the products.
   In a tile a column has WORDS words: fp32 numbers, or pairs of bf16 numbers of adjacent tokens,
   which halves the bytes that are read. */

#include <stdint.h>
#include <string.h>

#define WORDS 128
#define INLINE static inline __attribute__((always_inline))

typedef uint32_t row __attribute__((vector_size(64)));

#define LOW(s, j) ((j) & (s) ? 16 + (j) - (s) : (j))
#define HIGH(s, j) ((j) & (s) ? 16 + (j) : (j) + (s))
#define EACH(f, s) \
    f(s, 0), f(s, 1), f(s, 2), f(s, 3), f(s, 4), f(s, 5), f(s, 6), f(s, 7), \
        f(s, 8), f(s, 9), f(s, 10), f(s, 11), f(s, 12), f(s, 13), f(s, 14), f(s, 15)
/* One stage of a 16 x 16 transposition: swap the off-diagonal blocks of size s. */
#define SWAP(s) \
    for (int a = 0; a < 16; a++) \
        if (!(a & s)) { \
            row low = __builtin_shufflevector(r[a], r[a + s], EACH(LOW, s)); \
            r[a + s] = __builtin_shufflevector(r[a], r[a + s], EACH(HIGH, s)); \
            r[a] = low; \
        }

INLINE void transpose(row r[16]) { SWAP(8) SWAP(4) SWAP(2) SWAP(1) }


/* Transposes `tokens` rows of `width` numbers into `width` columns of WORDS words. Returns how many
   words of a column are filled. `narrow` is 1 for bf16, 0 for fp32. */
INLINE int lay(const char *from, int64_t width, int64_t tokens, int narrow, uint32_t *to) {
    const int deep = narrow ? 32 : 16; /* tokens of a block of 16 words */
    const int size = narrow ? 2 : 4;   /* bytes of a number */
    int filled = 0;
    for (int64_t t = 0; t < tokens; t += deep, filled += 16)
        for (int64_t c = 0; c < width; c += 16) {
            row r[16];
            if (!(c * size & 63)) /* once per cache line: fetch the next block's lines */
                for (int a = 0; a < deep; a++)
                    __builtin_prefetch(from + ((t + deep + a) * width + c) * size);
            if (t + deep <= tokens && c + 16 <= width && narrow)
                for (int a = 0; a < 16; a++) {
                    const uint16_t *even = (const uint16_t *)from + (t + 2 * a) * width + c;
                    const uint16_t *odd = even + width;
                    uint32_t pairs[16];
                    for (int k = 0; k < 16; k++)
                        pairs[k] = (uint32_t)even[k] | (uint32_t)odd[k] << 16;
                    memcpy(&r[a], pairs, 64);
                }
            else if (t + deep <= tokens && c + 16 <= width)
                for (int a = 0; a < 16; a++)
                    memcpy(&r[a], (const uint32_t *)from + (t + a) * width + c, 64);
            else { /* the edges, filled up with zeros */
                memset(r, 0, sizeof r);
                for (int64_t token = t; token < tokens && token < t + deep; token++)
                    for (int64_t k = c; k < width && k < c + 16; k++) {
                        const int64_t at = token - t, word = at / (deep / 16) * 16 + (k - c);
                        char *into = (char *)r + word * 4 + at % (deep / 16) * 2;
                        memcpy(into, from + (token * width + k) * size, size);
                    }
            }
            transpose(r);
            for (int64_t k = c; k < width && k < c + 16; k++)
                memcpy(to + k * WORDS + filled, &r[k - c], 64);
        }
    return filled;
}

/* The fp32 number of a word, or the upper of its two bf16 numbers. */
INLINE float upper(uint32_t word, int narrow) {
    float value;
    if (narrow)
        word &= 0xffff0000u;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float lower(uint32_t word) {
    float value;
    word <<= 16;
    memcpy(&value, &word, 4);
    return value;
}

INLINE float product(uint32_t a, uint32_t b, int narrow) {
    return narrow ? upper(a, 1) * upper(b, 1) + lower(a) * lower(b) : upper(a, 0) * upper(b, 0);
}

/* The products of one row of dy. Four at a time: their sums do not depend on each other, so the
   processor adds them in parallel. */
INLINE void products(const uint32_t *a, const uint32_t *x, const int32_t *col, int64_t count,
                     int words, int narrow, float *out) {
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
        const uint32_t *p = x + (int64_t)col[j] * WORDS;
        const uint32_t *q = x + (int64_t)col[j + 1] * WORDS;
        const uint32_t *u = x + (int64_t)col[j + 2] * WORDS;
        const uint32_t *v = x + (int64_t)col[j + 3] * WORDS;
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int z = 0; z < words; z++) {
            s0 += product(a[z], p[z], narrow);
            s1 += product(a[z], q[z], narrow);
            s2 += product(a[z], u[z], narrow);
            s3 += product(a[z], v[z], narrow);
        }
        out[j] += s0;
        out[j + 1] += s1;
        out[j + 2] += s2;
        out[j + 3] += s3;
    }
    for (; j < count; j++) {
        const uint32_t *p = x + (int64_t)col[j] * WORDS;
        float s = 0;
#pragma omp simd reduction(+ : s)
        for (int z = 0; z < words; z++)
            s += product(a[z], p[z], narrow);
        out[j] += s;
    }
}

/* t tokens, o outputs, i inputs; crow and col are the support in CSR form. `scratch` has room for
   o + i columns. */
INLINE void sampled(const char *dy, const char *x, const int32_t *crow, const int32_t *col,
                    float *out, int64_t t, int64_t o, int64_t i, uint32_t *scratch, int narrow) {
    const int tile = narrow ? 2 * WORDS : WORDS; /* tokens */
    const int size = narrow ? 2 : 4;             /* bytes of a number */
    uint32_t *left = scratch, *right = scratch + o * WORDS;
    for (int64_t start = 0; start < t; start += tile) {
        int64_t tokens = t - start < tile ? t - start : tile;
        int words = lay(dy + start * o * size, o, tokens, narrow, left);
        lay(x + start * i * size, i, tokens, narrow, right);
        for (int64_t r = 0; r < o; r++)
            products(left + r * WORDS, right, col + crow[r], crow[r + 1] - crow[r], words, narrow,
                     out + crow[r]);
    }
}

void sampled_bf16(const char *dy, const char *x, const int32_t *crow, const int32_t *col,
                  float *out, int64_t t, int64_t o, int64_t i, uint32_t *scratch) {
    sampled(dy, x, crow, col, out, t, o, i, scratch, 1);
}

void sampled_fp32(const char *dy, const char *x, const int32_t *crow, const int32_t *col,
                  float *out, int64_t t, int64_t o, int64_t i, uint32_t *scratch) {
    sampled(dy, x, crow, col, out, t, o, i, scratch, 0);
}
