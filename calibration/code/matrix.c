/* Dense matrices: blocked multiplication, LU decomposition with partial pivoting, and solving A x = b. */

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 64

typedef struct {
    size_t rows;
    size_t columns;
    double *values; /* row by row */
} matrix;

static inline double *at(const matrix *m, size_t row, size_t column) {
    return &m->values[row * m->columns + column];
}

int matrix_new(matrix *m, size_t rows, size_t columns) {
    if (columns != 0 && rows > (size_t)-1 / sizeof(double) / columns) {
        return ENOMEM;
    }
    m->values = calloc(rows * columns, sizeof(double));
    if (m->values == NULL && rows * columns != 0) {
        return ENOMEM;
    }
    m->rows = rows;
    m->columns = columns;
    return 0;
}

void matrix_free(matrix *m) {
    free(m->values);
    m->values = NULL;
    m->rows = m->columns = 0;
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

/* c += a * b, in blocks that stay in the first-level cache. */
int matrix_multiply(const matrix *a, const matrix *b, matrix *c) {
    if (a->columns != b->rows || c->rows != a->rows || c->columns != b->columns) {
        return EINVAL;
    }
    for (size_t i0 = 0; i0 < a->rows; i0 += BLOCK) {
        for (size_t k0 = 0; k0 < a->columns; k0 += BLOCK) {
            for (size_t j0 = 0; j0 < b->columns; j0 += BLOCK) {
                size_t i1 = smaller(i0 + BLOCK, a->rows);
                size_t k1 = smaller(k0 + BLOCK, a->columns);
                size_t j1 = smaller(j0 + BLOCK, b->columns);
                for (size_t i = i0; i < i1; i++) {
                    for (size_t k = k0; k < k1; k++) {
                        double factor = *at(a, i, k);
                        const double *source = at(b, k, 0);
                        double *target = at(c, i, 0);
                        for (size_t j = j0; j < j1; j++) {
                            target[j] += factor * source[j];
                        }
                    }
                }
            }
        }
    }
    return 0;
}

/* Overwrites a with L (unit diagonal, below) and U (above); order[i] is the original row that now stands at i. */
int lu_decompose(matrix *a, size_t *order) {
    if (a->rows != a->columns) {
        return EINVAL;
    }
    size_t n = a->rows;
    for (size_t i = 0; i < n; i++) {
        order[i] = i;
    }
    for (size_t k = 0; k < n; k++) {
        size_t pivot = k;
        for (size_t i = k + 1; i < n; i++) {
            if (fabs(*at(a, i, k)) > fabs(*at(a, pivot, k))) {
                pivot = i;
            }
        }
        if (fabs(*at(a, pivot, k)) < 1e-300) {
            return EDOM; /* singular */
        }
        if (pivot != k) {
            for (size_t j = 0; j < n; j++) {
                double held = *at(a, k, j);
                *at(a, k, j) = *at(a, pivot, j);
                *at(a, pivot, j) = held;
            }
            size_t held = order[k];
            order[k] = order[pivot];
            order[pivot] = held;
        }
        for (size_t i = k + 1; i < n; i++) {
            double factor = *at(a, i, k) / *at(a, k, k);
            *at(a, i, k) = factor;
            for (size_t j = k + 1; j < n; j++) {
                *at(a, i, j) -= factor * *at(a, k, j);
            }
        }
    }
    return 0;
}

void lu_solve(const matrix *lu, const size_t *order, const double *b, double *x) {
    size_t n = lu->rows;
    for (size_t i = 0; i < n; i++) {
        double sum = b[order[i]];
        for (size_t j = 0; j < i; j++) {
            sum -= *at(lu, i, j) * x[j];
        }
        x[i] = sum;
    }
    for (size_t i = n; i-- > 0;) {
        double sum = x[i];
        for (size_t j = i + 1; j < n; j++) {
            sum -= *at(lu, i, j) * x[j];
        }
        x[i] = sum / *at(lu, i, i);
    }
}

int main(void) {
    const double entries[9] = {2, 1, -1, -3, -1, 2, -2, 1, 2};
    const double b[3] = {8, -11, -3};
    double x[3];
    size_t order[3];
    matrix a;
    if (matrix_new(&a, 3, 3) != 0) {
        perror("matrix_new");
        return EXIT_FAILURE;
    }
    memcpy(a.values, entries, sizeof entries);
    int status = lu_decompose(&a, order);
    if (status != 0) {
        fprintf(stderr, "cannot decompose: %s\n", strerror(status));
        matrix_free(&a);
        return EXIT_FAILURE;
    }
    lu_solve(&a, order, b, x);
    printf("x = (%g, %g, %g)\n", x[0], x[1], x[2]); /* (2, 3, -1) */
    matrix_free(&a);
    return EXIT_SUCCESS;
}
