/* A bounded queue for many producers and consumers, and a thread pool on top of it. */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct queue {
    void **items;
    size_t capacity, head, count;
    bool closed;
    pthread_mutex_t lock;
    pthread_cond_t not_empty, not_full;
};

int queue_init(struct queue *q, size_t capacity)
{
    memset(q, 0, sizeof *q);
    q->items = calloc(capacity, sizeof *q->items);
    if (q->items == NULL)
        return ENOMEM;
    q->capacity = capacity;
    pthread_mutex_init(&q->lock, NULL);
    pthread_cond_init(&q->not_empty, NULL);
    pthread_cond_init(&q->not_full, NULL);
    return 0;
}

void queue_destroy(struct queue *q)
{
    pthread_cond_destroy(&q->not_full);
    pthread_cond_destroy(&q->not_empty);
    pthread_mutex_destroy(&q->lock);
    free(q->items);
}

/* Waits while the queue is full; returns false when it has been closed. */
bool queue_push(struct queue *q, void *item)
{
    bool pushed = false;
    pthread_mutex_lock(&q->lock);
    while (q->count == q->capacity && !q->closed)
        pthread_cond_wait(&q->not_full, &q->lock);
    if (!q->closed) {
        q->items[(q->head + q->count) % q->capacity] = item;
        q->count++;
        pushed = true;
        pthread_cond_signal(&q->not_empty);
    }
    pthread_mutex_unlock(&q->lock);
    return pushed;
}

bool queue_pop(struct queue *q, void **item)
{
    bool found = false;
    pthread_mutex_lock(&q->lock);
    while (q->count == 0 && !q->closed)
        pthread_cond_wait(&q->not_empty, &q->lock);
    if (q->count > 0) {
        *item = q->items[q->head];
        q->head = (q->head + 1) % q->capacity;
        q->count--;
        found = true;
        pthread_cond_signal(&q->not_full);
    }
    pthread_mutex_unlock(&q->lock);
    return found;
}

void queue_close(struct queue *q)
{
    pthread_mutex_lock(&q->lock);
    q->closed = true;
    pthread_cond_broadcast(&q->not_empty);
    pthread_cond_broadcast(&q->not_full);
    pthread_mutex_unlock(&q->lock);
}

struct job {
    void (*run)(void *);
    void *argument;
};

struct pool {
    struct queue jobs;
    pthread_t *threads;
    int num_threads;
};

static void *worker(void *argument)
{
    struct pool *pool = argument;
    void *item;
    while (queue_pop(&pool->jobs, &item)) {
        struct job *job = item;
        job->run(job->argument);
        free(job);
    }
    return NULL;
}

int pool_start(struct pool *pool, int num_threads, size_t backlog)
{
    int error = queue_init(&pool->jobs, backlog);
    if (error)
        return error;
    pool->threads = calloc(num_threads, sizeof *pool->threads);
    if (pool->threads == NULL) {
        queue_destroy(&pool->jobs);
        return ENOMEM;
    }
    for (pool->num_threads = 0; pool->num_threads < num_threads; pool->num_threads++) {
        error = pthread_create(&pool->threads[pool->num_threads], NULL, worker, pool);
        if (error)
            break;
    }
    return pool->num_threads > 0 ? 0 : error;
}

bool pool_submit(struct pool *pool, void (*run)(void *), void *argument)
{
    struct job *job = malloc(sizeof *job);
    if (job == NULL)
        return false;
    *job = (struct job){ .run = run, .argument = argument };
    if (!queue_push(&pool->jobs, job)) {
        free(job);
        return false;
    }
    return true;
}

void pool_finish(struct pool *pool)
{
    queue_close(&pool->jobs);
    for (int i = 0; i < pool->num_threads; i++)
        pthread_join(pool->threads[i], NULL);
    queue_destroy(&pool->jobs);
    free(pool->threads);
}

static pthread_mutex_t total_lock = PTHREAD_MUTEX_INITIALIZER;
static long total;

static void add(void *argument)
{
    pthread_mutex_lock(&total_lock);
    total += (long)argument;
    pthread_mutex_unlock(&total_lock);
}

int main(void)
{
    struct pool pool;
    int error = pool_start(&pool, 4, 64);
    if (error) {
        fprintf(stderr, "pool: %s\n", strerror(error));
        return EXIT_FAILURE;
    }
    for (long i = 1; i <= 1000; i++)
        pool_submit(&pool, add, (void *)i);
    pool_finish(&pool);
    printf("%ld\n", total);
    return total == 500500 ? EXIT_SUCCESS : EXIT_FAILURE;
}
