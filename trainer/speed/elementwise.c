/* The parts of a training step on a CPU that are not matrix products, each in one pass over its
   tensors, which are read from memory once. See elementwise.py for the formulas.

   Numbers are bf16 or fp32 in memory, and fp32 in between. The compiler vectorises the loops: there
   is no call and no branch in them. No -ffast-math: NaN and infinity stay what they are. */

/* gcc takes half of the width by default: gated() is 1.3 times as fast with all of it. */
#if defined(__AVX512F__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float get(const char *from, int64_t i, int half) {
    float value;
    if (half) {
        uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
        memcpy(&value, &bits, 4);
        return value;
    }
    return ((const float *)from)[i];
}

/* The nearest bf16 number, the even one of two; a NaN stays one. */
INLINE uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 64) : (uint16_t)nearest;
}

INLINE void put(char *to, int64_t i, float value, int half) {
    if (half)
        ((uint16_t *)to)[i] = rounded(value);
    else
        ((float *)to)[i] = value;
}

/* exp(x) within 2 units in the last place, by Cephes' expf: x = n ln 2 + r, a polynomial in r, and n
   into the exponent. It is 0 below -87, where a result is hardly a normal number, and finite above
   88. Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits. */
INLINE float exponential(float x) {
    float within = x < -87.0f ? -87.0f : x;
    within = within > 88.0f ? 88.0f : within;
    float n = within * 1.44269504089f + 12582912.0f;
    uint32_t bits;
    memcpy(&bits, &n, 4);
    bits = (bits + 127) << 23;
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
    memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : y * scale;
}

INLINE void gated(const char *gate, const char *up, char *out, int64_t n, int half) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = get(gate, i, half), u = get(up, i, half);
        put(out, i, g / (1.0f + exponential(-g)) * u, half);
    }
}

INLINE void gated_back(const char *dh, const char *gate, const char *up, char *dgate, char *dup,
                       int64_t n, int half) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float d = get(dh, i, half), g = get(gate, i, half), u = get(up, i, half);
        float s = 1.0f / (1.0f + exponential(-g)), a = g * s;
        put(dgate, i, d * u * (s + a * (1.0f - s)), half);
        put(dup, i, d * a, half);
    }
}

/* y = w round(x r); r (rows,) is kept for the backward pass. */
INLINE void norm(const char *x, const char *w, char *y, float *r, int64_t rows, int64_t d,
                 float eps, int half) {
    const int size = half ? 2 : 4;
    for (int64_t row = 0; row < rows; row++, x += d * size, y += d * size) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++)
            sum += get(x, i, half) * get(x, i, half);
        const float scale = 1.0f / sqrtf(sum / (float)d + eps);
        r[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float hat = get(x, i, half) * scale;
            if (half) {
                uint16_t bits = rounded(hat);
                hat = get((const char *)&bits, 0, 1);
            }
            put(y, i, get(w, i, half) * hat, half);
        }
    }
}

INLINE void norm_back(const char *dy, const char *x, const char *w, const float *r, char *dx,
                      int64_t rows, int64_t d, int half) {
    const int size = half ? 2 : 4;
    for (int64_t row = 0; row < rows; row++, dy += d * size, x += d * size, dx += d * size) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++)
            sum += get(dy, i, half) * get(w, i, half) * get(x, i, half);
        const float scale = r[row], along = sum * scale * scale / (float)d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++)
            put(dx, i, scale * (get(dy, i, half) * get(w, i, half) - along * get(x, i, half)),
                half);
    }
}

/* Rotates the pairs (i, i + d/2) of each head, back with back = 1. x is (B, H, T, d) with strides
   of b, h and t in numbers, out is (B, T, H, d). cos and sin are (B, T, d), or the same for all B
   with `step` 0. */
INLINE void rotated(const char *x, const char *cosine, const char *sine, char *out, int64_t from,
                    int64_t to, const int64_t *shape, int back, int half) {
    const int size = half ? 2 : 4;
    const int64_t H = shape[0], T = shape[1], d = shape[2], step = shape[6], middle = d / 2;
    for (int64_t at = from; at < to; at++) {
        const int64_t b = at / T, t = at % T;
        const char *c = cosine + (b * step + t * d) * size, *s = sine + (b * step + t * d) * size;
        for (int64_t h = 0; h < H; h++) {
            const char *p = x + (b * shape[3] + h * shape[4] + t * shape[5]) * size;
            char *y = out + (at * H + h) * d * size;
#pragma omp simd
            for (int64_t i = 0; i < middle; i++) {
                float one = get(p, i, half), two = get(p, i + middle, half);
                float c1 = get(c, i, half), c2 = get(c, i + middle, half);
                float s1 = get(s, i, half), s2 = get(s, i + middle, half);
                put(y, i, back ? one * c1 + two * s2 : one * c1 - two * s1, half);
                put(y, i + middle, back ? two * c2 - one * s1 : two * c2 + one * s2, half);
            }
        }
    }
}

#define PART 2048 /* exponentials that are added up in fp32 */

/* For each row of V logits: the loss, how many logits are before the target's (a larger one, or the
   same one earlier), and if slopes is not null the gradient of weight * loss. `top` of 1 asks only
   whether any is before it. scratch has room for V numbers. */
INLINE void entropy(const char *logits, const int64_t *targets, const float *weights, float *losses,
                    int64_t *before, char *slopes, int64_t rows, int64_t V, int64_t top,
                    float *scratch, int half) {
    const int size = half ? 2 : 4;
    for (int64_t row = 0; row < rows; row++, logits += V * size) {
        const int64_t target = targets[row];
        const float own = get(logits, target, half);
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < V; j++) {
            float x = get(logits, j, half);
            most = x > most ? x : most;
        }
        double sum = 0;
        for (int64_t start = 0; start < V; start += PART) {
            const int64_t end = start + PART < V ? start + PART : V;
            float part = 0;
#pragma omp simd reduction(+ : part)
            for (int64_t j = start; j < end; j++) {
                float e = exponential(get(logits, j, half) - most);
                scratch[j] = e;
                part += e;
            }
            sum += part;
        }
        losses[row] = (float)log(sum) + (most - own);
        int64_t earlier = own == most ? 0 : 1;
        if (top > 1) {
            earlier = 0;
#pragma omp simd reduction(+ : earlier)
            for (int64_t j = 0; j < V; j++)
                earlier += get(logits, j, half) > own;
        }
        if (top > 1 || own == most)
#pragma omp simd reduction(+ : earlier)
            for (int64_t j = 0; j < target; j++)
                earlier += get(logits, j, half) == own;
        before[row] = own == own ? earlier : V;
        if (!slopes)
            continue;
        const float weight = weights ? weights[row] : 1.0f, scale = (float)(weight / sum);
#pragma omp simd
        for (int64_t j = 0; j < V; j++)
            put(slopes, j, scratch[j] * scale, half);
        put(slopes, target, scratch[target] * scale - weight, half);
        slopes += V * size;
    }
}

/* Each for both kinds of numbers, under NAME_bf16 and NAME_fp32. */
#define BOTH(name, parameters, ...) \
    void name##_bf16 parameters { name(__VA_ARGS__, 1); } \
    void name##_fp32 parameters { name(__VA_ARGS__, 0); }

BOTH(gated, (const char *gate, const char *up, char *out, int64_t n), gate, up, out, n)
BOTH(gated_back,
     (const char *dh, const char *gate, const char *up, char *dgate, char *dup, int64_t n),
     dh, gate, up, dgate, dup, n)
BOTH(norm,
     (const char *x, const char *w, char *y, float *r, int64_t rows, int64_t d, float eps),
     x, w, y, r, rows, d, eps)
BOTH(norm_back,
     (const char *dy, const char *x, const char *w, const float *r, char *dx, int64_t rows,
      int64_t d),
     dy, x, w, r, dx, rows, d)
BOTH(rotated,
     (const char *x, const char *cosine, const char *sine, char *out, int64_t from, int64_t to,
      const int64_t *shape, int64_t back),
     x, cosine, sine, out, from, to, shape, (int)back)
BOTH(entropy,
     (const char *logits, const int64_t *targets, const float *weights, float *losses,
      int64_t *before, char *slopes, int64_t rows, int64_t V, int64_t top, float *scratch),
     logits, targets, weights, losses, before, slopes, rows, V, top, scratch)
