/* What every file of kernels needs: how the compiler makes a copy of each for every width of vectors. */

#define INLINE static inline __attribute__((always_inline))

/* One copy of each kernel for every width of vectors; the loader picks. By levels rather than by names of processors, of
 * which a loader knows only those that it was written for. */
#if defined(EVERY_WIDTH) /* a sanitizer wants one copy */
#elif defined(__x86_64__) && defined(__GLIBC__) && __GNUC__ >= 12
#define EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GLIBC__) && (__GNUC__ >= 9 || __clang_major__ >= 14)
#define EVERY_WIDTH __attribute__((target_clones("avx2", "default")))
#else
#define EVERY_WIDTH
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "blocks are little-endian"
#endif
