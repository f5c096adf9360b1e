/* Rows of a weight, or blocks, shared among threads: each takes the next few until there are no more, so that one that
 * other programs hold up takes fewer of them. It knows neither Python nor torch nor how a row or a block is computed. */

#include <stddef.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "decoders.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

enum {
    MAX_THREADS = 1024,
    LARGE = 4 << 20,         /* bytes that no core's own cache keeps until they are read */
    RUNS_EACH = 8,           /* as team.py has it */
    ALONE_BELOW = 1 << 17,   /* numbers: one thread has unpacked fewer before others are awake */
    UNSTARTED_BELOW = 1 << 20, /* or before they have been started */
};

/* Calls `work(task)` in so many threads at once, the calling one among them: GOMP_parallel, as OpenMP has it. */
typedef void Parallel(void (*work)(void *), void *task, unsigned threads, unsigned flags);

/* How many rows from `first` on come before one that is damaged: `end - first` if none is. */
typedef size_t Product(const void *weight, size_t first, size_t end, const float *vectors, size_t count, float *out,
    size_t stride, float *buffer);
typedef size_t Rows(const void *weight, size_t first, size_t end, void *out, int narrow, float *buffer);

/* Who computes: `threads` of them, which `parallel` has waiting, or which are started if it is NULL. A thread takes `run`
 * rows at a time, and has room for `room` numbers in `buffers`. */
typedef struct {
    Parallel *parallel;
    size_t threads, run, room;
    float *buffers;
} Team;

typedef struct {
    const Team *team;
    size_t (*compute)(const void *job, size_t first, size_t end, float *buffer);
    const void *job;
    size_t end, next, arrived, whole; /* rows, the next of them, threads that have come, rows before a damaged one */
} Task;

static void take_runs(void *shared) {
    Task *task = shared;
    const Team *team = task->team;
    size_t place = __atomic_fetch_add(&task->arrived, 1, __ATOMIC_RELAXED), first;
    if (place >= team->threads)
        return;
    while ((first = __atomic_fetch_add(&task->next, team->run, __ATOMIC_RELAXED)) < task->end) {
        size_t end = first + team->run < task->end ? first + team->run : task->end;
        size_t row = first + task->compute(task->job, first, end, team->buffers + place * team->room);
        size_t whole = __atomic_load_n(&task->whole, __ATOMIC_RELAXED);
        while (row < end && row < whole
               && !__atomic_compare_exchange_n(&task->whole, &whole, row, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            ;
    }
}

#if !defined(_WIN32)
static void *begin(void *task) {
    take_runs(task);
    return NULL;
}
#endif

/* As `Parallel`, by threads that end with it: fewer if the system starts no more. */
static void start_threads(Task *task) {
#if !defined(_WIN32)
    pthread_t others[MAX_THREADS];
    size_t started = 0;
    while (started + 1 < task->team->threads && started < MAX_THREADS
           && !pthread_create(&others[started], NULL, begin, task))
        started++;
    take_runs(task);
    while (started)
        pthread_join(others[--started], NULL);
#else
    take_runs(task);
#endif
}

static size_t work_out(Task *task) {
    task->whole = task->end;
    if (task->team->threads < 2)
        take_runs(task);
    else if (task->team->parallel)
        task->team->parallel(take_runs, task, (unsigned)task->team->threads, 0);
    else
        start_threads(task);
    return task->whole;
}

/* ---------------------------------------------------------------------------------------------------- what is computed */

typedef struct {
    Product *kernel;
    const void *weight;
    const float *vectors;
    size_t count;
    float *out;
    size_t stride;
} Products;

static size_t some_products(const void *job, size_t first, size_t end, float *buffer) {
    const Products *some = job;
    return some->kernel(some->weight, first, end, some->vectors, some->count, some->out, some->stride, buffer);
}

/* `kernel`, a product_TYPE, of all rows. How many rows come before one with a damaged block. */
size_t team_product(const Team *team, Product *kernel, const void *weight, size_t rows, const float *vectors, size_t count,
    float *out, size_t stride) {
    Products job = {kernel, weight, vectors, count, out, stride};
    Task task = {.team = team, .compute = some_products, .job = &job, .end = rows};
    return work_out(&task);
}

typedef struct {
    Rows *kernel;
    const void *weight;
    size_t before, row_bytes;
    char *out;
    int narrow;
} Dense;

static size_t some_rows(const void *job, size_t first, size_t end, float *buffer) {
    const Dense *some = job;
    return some->kernel(some->weight, some->before + first, some->before + end, some->out + first * some->row_bytes,
        some->narrow, buffer);
}

/* How many of `count` things of `stored` bytes each at `packed` may be written at `out`, where each takes `wide`, before they
 * fall on what has not been read: all, if they lie elsewhere. They lie so that they end where their numbers do, or behind. */
static size_t free_of(const void *packed, size_t stored, size_t count, const void *out, size_t wide) {
    uintptr_t from = (uintptr_t)packed, to = (uintptr_t)out;
    size_t some = from > to ? (from - to) / wide : 0;
    return from >= to + count * wide || from + count * stored <= to || some > count ? count : some;
}

/* As `team`, for so much less: a part of it, or who calls alone. */
static Team for_some(const Team *team, size_t count, size_t numbers) {
    Team turn = *team;
    if (count * numbers < (team->parallel ? ALONE_BELOW : UNSTARTED_BELOW))
        turn.threads = 1;
    turn.run = count / (turn.threads * RUNS_EACH) + 1;
    return turn;
}

/* `kernel`, a rows_TYPE, of `rows` rows after the first `before`, each of which takes `row_bytes` in `out`, and `stored_bytes`
 * from `numbers` on. These may lie at the end of `out`: then as many at once as fill what has been read. As above. */
size_t team_rows(const Team *team, Rows *kernel, const void *weight, size_t before, size_t rows, void *out, int narrow,
    size_t row_bytes, const char *numbers, size_t stored_bytes) {
    size_t done = 0;
    while (done < rows) {
        char *to = (char *)out + done * row_bytes;
        size_t some = free_of(numbers + (before + done) * stored_bytes, stored_bytes, rows - done, to, row_bytes);
        if (some == 0)
            some = 1; /* a row is read before it is written */
        Dense job = {kernel, weight, before + done, row_bytes, to, narrow};
        Team turn = some < rows ? for_some(team, some, row_bytes / (narrow ? 2 : 4)) : *team;
        Task task = {.team = &turn, .compute = some_rows, .job = &job, .end = some};
        size_t whole = work_out(&task);
        done += whole;
        if (whole < some)
            break;
    }
    return done;
}

/* Blocks of one type: `nbytes` each, of `elements` numbers that take `item_bytes` each unpacked. */
typedef struct {
    const void *decode; /* a DecodeLossless of `slots` if `is_lossless`, else a DecodeBlocks with `grid` */
    const void *grid;
    size_t nbytes, elements, item_bytes, slots, is_lossless;
} Blocks;

typedef struct {
    const Blocks *blocks;
    const uint8_t *packed;
    char *out;
    const Team *team;
    int is_large;
} Unpacking;

static size_t decode(const Blocks *blocks, const uint8_t *packed, size_t count, void *out) {
    if (blocks->is_lossless)
        return ((DecodeLossless *)blocks->decode)(packed, out, count, blocks->elements, blocks->slots);
    ((DecodeBlocks *)blocks->decode)(packed, out, count, blocks->item_bytes == 2, blocks->grid);
    return count;
}

/* Copies past the caches, where the processor can: what is written is read again when all of it has been, from memory, and
 * lines that are written whole need not be fetched before. */
static void write_past_caches(char *restrict out, const char *restrict from, size_t nbytes) {
#if defined(__SSE2__)
    size_t head = (size_t)(-(uintptr_t)out % 16);
    if (head > nbytes)
        head = nbytes;
    memcpy(out, from, head);
    size_t at = head;
    for (; at + 64 <= nbytes; at += 64)
        for (size_t part = 0; part < 64; part += 16)
            _mm_stream_si128((__m128i *)(out + at + part), _mm_loadu_si128((const __m128i *)(from + at + part)));
    memcpy(out + at, from + at, nbytes - at);
#else
    memcpy(out, from, nbytes);
#endif
}

static size_t some_blocks(const void *job, size_t first, size_t end, float *buffer) {
    const Unpacking *some = job;
    const Blocks *blocks = some->blocks;
    size_t wide = blocks->elements * blocks->item_bytes, most = some->team->room * sizeof *buffer / wide;
    const uint8_t *packed = some->packed;
    if (!some->is_large)
        return decode(blocks, packed + first * blocks->nbytes, end - first, some->out + first * wide);
    for (size_t at = first; at < end; at += most) {
        size_t count = end - at < most ? end - at : most;
        size_t whole = decode(blocks, packed + at * blocks->nbytes, count, buffer);
        if (whole < count)
            return at + whole - first;
        write_past_caches(some->out + at * wide, (const char *)buffer, count * wide);
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
    return end - first;
}

/* Unpacks `count` blocks at `packed`, which lie elsewhere, or at the end of the memory at `out` that their numbers fill, or
 * reach beyond it: there in turns of as many as fill what has been read. How many come before a damaged one. */
size_t team_unpack(const Team *team, const Blocks *blocks, const uint8_t *packed, size_t count, char *out) {
    size_t wide = blocks->elements * blocks->item_bytes, done = 0;
    while (done < count) {
        Unpacking job = {blocks, packed + done * blocks->nbytes, out + done * wide, team, count * wide > LARGE};
        size_t some = free_of(job.packed, blocks->nbytes, count - done, job.out, wide);
        if (some == 0) { /* numbers of the last blocks would fall on themselves */
            memcpy(team->buffers, job.packed, blocks->nbytes);
            job.packed = (const uint8_t *)team->buffers;
            job.is_large = 0;
            some = 1;
        }
        Team turn = for_some(team, some, blocks->elements);
        Task task = {.team = &turn, .compute = some_blocks, .job = &job, .end = some};
        size_t whole = work_out(&task);
        done += whole;
        if (whole < some)
            break;
    }
    return done;
}
