// Vectors of floats, of the widest kind that this CPU has, and how they are loaded from each kind of weight.
#pragma once

#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__)
typedef __m512 Vec;
constexpr int LANES = 16;
constexpr int MOST_ROWS = 8;  // of a product at once
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
typedef __m256 Vec;
constexpr int LANES = 8;
constexpr int MOST_ROWS = 6;
#else
#error "these kernels need AVX2 with FMA and F16C, or AVX-512"
#endif

constexpr int WIDTH = 2;  // vectors of a panel: with MOST_ROWS rows their sums fill the registers

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

#if defined(__AVX512F__)
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec spread(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec load(const Bfloat* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec largest(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smallest(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec rounded(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec whole) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
}
#else
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec spread(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Vec load(const Bfloat* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec largest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smallest(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec rounded(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec power_of_two(Vec whole) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}
#endif

// Four sums across vectors, each in the same order of additions.
inline void store_sums(float* p, Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
    p[0] = _mm512_reduce_add_ps(a), p[1] = _mm512_reduce_add_ps(b);
    p[2] = _mm512_reduce_add_ps(c), p[3] = _mm512_reduce_add_ps(d);
#else
    Vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#endif
}

// Keeps the compiler from loading a vector again at each use.
inline Vec in_register(Vec x) {
    asm("" : "+v"(x));
    return x;
}

inline float sum_of(Vec x) {
    alignas(64) float lanes[LANES];
    store(lanes, x);
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

// The nearest number to x between two bounds; NaN stays, as the processor's own choice between two is the second then.
inline Vec within(float low, Vec x, float high) { return smallest(spread(high), largest(spread(low), x)); }

// e^x for x <= 88, to about one unit in the last place; e^-87 below -87. x = n ln 2 + r, and e^r by its series.
inline Vec exponential(Vec x) {
    x = within(-87.0f, x, 88.0f);
    Vec n = rounded(x * spread(1.44269504f));
    Vec r = multiply_add(n, spread(-0.693359375f), x);
    r = multiply_add(n, spread(2.12194440e-4f), r);
    Vec sum = spread(1.0f / 5040);
    sum = multiply_add(sum, r, spread(1.0f / 720));
    sum = multiply_add(sum, r, spread(1.0f / 120));
    sum = multiply_add(sum, r, spread(1.0f / 24));
    sum = multiply_add(sum, r, spread(1.0f / 6));
    sum = multiply_add(sum, r, spread(0.5f));
    sum = multiply_add(sum, r, spread(1.0f));
    sum = multiply_add(sum, r, spread(1.0f));
    return sum * power_of_two(n);
}
