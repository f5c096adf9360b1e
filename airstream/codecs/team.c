/* Rows of a weight, shared among threads: each takes the next few until there are no more, so that one that other
 * programs hold up takes fewer of them. It knows neither Python nor torch nor how a row is computed. */

#include <stddef.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

enum { MAX_THREADS = 1024 };

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

/* `kernel`, a rows_TYPE, of `rows` rows after the first `before`, each of which takes `row_bytes` in `out`. As above. */
size_t team_rows(const Team *team, Rows *kernel, const void *weight, size_t before, size_t rows, void *out, int narrow,
    size_t row_bytes) {
    Dense job = {kernel, weight, before, row_bytes, out, narrow};
    Task task = {.team = team, .compute = some_rows, .job = &job, .end = rows};
    return work_out(&task);
}
