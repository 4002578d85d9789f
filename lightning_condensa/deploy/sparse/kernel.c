/* y = epilogue(W * x + b) where most of W is zero: convolutions, and linear layers as 1 x 1 ones.
 *
 * A convolution whose input lies in memory with its padding is a sum of shifted copies of that
 * input, one for each non-zero weight: output positions are lanes, a weight is broadcast, and its
 * offset says where the shifted copy starts. A tile of up to 12 vectors of positions stays in
 * registers while the weights of one output channel pass by.
 *
 * The input is laid out as [channel][phase][row][column][sample]. With stride s the positions that
 * one weight sees are s apart; phases hold every s-th row and column, so that they are neighbours.
 * Rows are as long as outputs plus the reach of the filter; what a tile computes in that surplus
 * is dropped when the result is written. Several samples lie side by side where one alone has too
 * few outputs for a tile.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Not 16 on AVX-512: shifted copies start anywhere, so that every load of 64 bytes takes in two cache
 * lines, and positions are rounded up to whole vectors. */
#if defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define MAX_TILE 12

/* Measured on one kind of CPU; on others they cost some speed at most. */
#define FIRST_CACHE (32 * 1024)
#define SECOND_CACHE (256 * 1024)   /* of which a part is for other things */
#define SCRATCH (4 * 1024 * 1024)   /* bytes of working memory for samples side by side */
#define WEIGHTS_A_VISIT 8           /* of a filter to a block of channels */

typedef float wide __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float narrow __attribute__((vector_size(2 * LANES), aligned(4)));

/* Mirrored field by field in geometry.py. */
typedef struct {
    int64_t samples;                           /* side by side */
    int64_t channels, height, width;           /* of x */
    int64_t filters, out_height, out_width;    /* of W * x */
    int64_t top, left;                         /* rows and columns of zeros before x */
    int64_t stride_h, stride_w;
    int64_t dilation_h, dilation_w;
    int64_t phases_h, phases_w;
    int64_t rows, columns;                     /* of one phase */
    int64_t relu;                              /* 0 or 1 */
    int64_t pool;                              /* side of the max pooling, 1 for none */
} geometry;

typedef void (*tile)(const float *, const int32_t *, const float *, int64_t, const float *,
                     float *);

/* T vectors of output positions; U weights at a time, so that enough sums are under way to hide
 * the latency of an addition. Sums start from the bias, or go on from y where it is NULL. */
#define TILE(NAME, VECTOR, T, U)                                                                  \
    static void NAME(const float *x, const int32_t *offset, const float *weight, int64_t n,       \
                     const float *bias, float *y) {                                               \
        enum { STEP = sizeof(VECTOR) / sizeof(float) };                                           \
        VECTOR sum[U][T] = {0};                                                                   \
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)                                      \
            sum[0][t] = bias ? *bias + (VECTOR){0} : *(const VECTOR *)(y + t * STEP);             \
        int64_t j = 0;                                                                            \
        for (; j + U <= n; j += U)                                                                \
            _Pragma("GCC unroll 16") for (int u = 0; u < U; u++)                                  \
                _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)                              \
                    sum[u][t] += weight[j + u] * *(const VECTOR *)(x + offset[j + u] + t * STEP); \
        for (; j < n; j++)                                                                        \
            _Pragma("GCC unroll 16") for (int t = 0; t < T; t++)                                  \
                sum[0][t] += weight[j] * *(const VECTOR *)(x + offset[j] + t * STEP);             \
        _Pragma("GCC unroll 16") for (int t = 0; t < T; t++) {                                    \
            _Pragma("GCC unroll 16") for (int u = 1; u < U; u++) sum[0][t] += sum[u][t];          \
            *(VECTOR *)(y + t * STEP) = sum[0][t];                                                \
        }                                                                                         \
    }

TILE(tile_half, narrow, 1, 8)
TILE(tile_1, wide, 1, 8)
TILE(tile_2, wide, 2, 4)
TILE(tile_3, wide, 3, 4)
TILE(tile_4, wide, 4, 2)
TILE(tile_5, wide, 5, 2)
TILE(tile_6, wide, 6, 2)
TILE(tile_7, wide, 7, 1)
TILE(tile_8, wide, 8, 1)
TILE(tile_9, wide, 9, 1)
TILE(tile_10, wide, 10, 1)
TILE(tile_11, wide, 11, 1)
TILE(tile_12, wide, 12, 1)

static const tile TILES[MAX_TILE + 1] = {
    tile_half, tile_1, tile_2, tile_3, tile_4,  tile_5,  tile_6,
    tile_7,    tile_8, tile_9, tile_10, tile_11, tile_12};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t clamp(int64_t a, int64_t low, int64_t high) {
    return a < low ? low : a > high ? high : a;
}

/* Output positions of the layout, those of the surplus included. */
static int64_t count_positions(const geometry *g) {
    return ((g->out_height - 1) * g->columns + g->out_width) * g->samples;
}

static int64_t padded_positions(const geometry *g) {
    return ceil_div(count_positions(g), LANES) * LANES;
}

static int64_t laid_out(const geometry *g) {
    return g->channels * g->phases_h * g->phases_w * g->samples * g->rows * g->columns;
}

/* Whether every sample is one position, as for a linear layer. */
static int is_matrix(const geometry *g) {
    return g->height * g->width == 1 && g->rows * g->columns == 1 &&
           g->phases_h * g->phases_w == 1 && g->top == 0 && g->left == 0;
}

/* The part [first, last) of a row of `count` that lies inside an input of `length`, where entry q
 * is entry q * stride + shift of the input. */
typedef struct {
    int64_t shift, stride, first, last;
} span;

static span inside(int64_t shift, int64_t stride, int64_t count, int64_t length) {
    span s = {shift, stride, 0, 0};
    s.last = clamp(shift < length ? ceil_div(length - shift, stride) : 0, 0, count);
    s.first = clamp(shift < 0 ? ceil_div(-shift, stride) : 0, 0, s.last);
    return s;
}

/* to[c][r] = max(from[r][c], least), through a block that fits into registers and a few lines. */
static void transpose(const float *from, int64_t from_pitch, float *to, int64_t to_pitch,
                      int64_t rows, int64_t columns, float least) {
    float block[LANES][LANES];
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            int64_t high = rows - r < LANES ? rows - r : LANES;
            int64_t wide = columns - c < LANES ? columns - c : LANES;
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) {
                    float v = from[(r + i) * from_pitch + c + j];
                    block[j][i] = v < least ? least : v;
                }
            for (int64_t j = 0; j < wide; j++)
                for (int64_t i = 0; i < high; i++) to[(c + j) * to_pitch + r + i] = block[j][i];
        }
}

/* One row of `count` samples, which are `pitch` apart. */
static inline void copy_row(const float *x, int64_t pitch, int64_t stride, float *restrict to,
                            int64_t to_pitch, int64_t count, int64_t length) {
    if (count > 1 && stride == 1)
        transpose(x, pitch, to, to_pitch, count, length, -INFINITY);
    else if (stride == 1)
        for (int64_t q = 0; q < length; q++) to[q * to_pitch] = x[q];
    else
        for (int64_t n = 0; n < count; n++)
            for (int64_t q = 0; q < length; q++) to[q * to_pitch + n] = x[n * pitch + q * stride];
}

/* Copies channels [from, to) of `count` samples into the layout above. */
static void lay_out(const float *x, int64_t count, float *buffer, const geometry *g, int64_t from,
                    int64_t to) {
    if (is_matrix(g)) {
        transpose(x + from, g->channels, buffer + from * g->samples, g->samples, count, to - from,
                  -INFINITY);
        return;
    }
    int64_t samples = g->samples, row_floats = g->columns * samples;
    int64_t pitch = g->channels * g->height * g->width;
    int64_t phases = g->phases_h * g->phases_w;
    for (int64_t phase = 0; phase < phases; phase++) {
        int64_t a = phase / g->phases_w, b = phase % g->phases_w;
        span h = inside(a * g->dilation_h % g->stride_h - g->top, g->stride_h, g->rows, g->height);
        span w = inside(b * g->dilation_w % g->stride_w - g->left, g->stride_w, g->columns,
                        g->width);
        for (int64_t c = from; c < to; c++) {
            float *target = buffer + (c * phases + phase) * g->rows * row_floats;
            for (int64_t i = 0; i < g->rows * row_floats; i++) target[i] = 0;
            for (int64_t r = h.first; r < h.last; r++) {
                const float *row = x + (c * g->height + r * h.stride + h.shift) * g->width +
                                   w.first * w.stride + w.shift;
                copy_row(row, pitch, w.stride, target + r * row_floats + w.first * samples, samples,
                         count, w.last - w.first);
            }
        }
    }
}

/* The largest of a square of inputs, `across` and `down` apart; a NaN wins, as in torch. */
static inline float largest(const float *x, int64_t across, int64_t down, int64_t side) {
    float best = x[0];
    for (int64_t i = 0; i < side; i++)
        for (int64_t j = 0; j < side; j++) {
            float v = x[i * down + j * across];
            best = v > best || v != v ? v : best;
        }
    return best;
}

static inline void write_pooled(const float *restrict sums, float *restrict y, int64_t count,
                                const geometry *g, int64_t from, int64_t to, int64_t pool,
                                int64_t samples) {
    int64_t height = g->out_height / pool, width = g->out_width / pool;
    int64_t down = g->columns * samples, padded = padded_positions(g);
    float least = g->relu ? 0 : -INFINITY;
    for (int64_t f = from; f < to; f++)
        for (int64_t h = 0; h < height; h++)
            for (int64_t n = 0; n < count; n++) {
                const float *source = sums + f * padded + h * pool * down + n;
                float *target = y + ((n * g->filters + f) * height + h) * width;
                for (int64_t w = 0; w < width; w++) {
                    float v = largest(source + w * pool * samples, samples, down, pool);
                    target[w] = v < least ? least : v;
                }
            }
}

/* Writes filters [from, to) of `count` samples to y: without the surplus, rectified, pooled. */
static void write_out(const float *sums, float *y, int64_t count, const geometry *g, int64_t from,
                      int64_t to) {
    int64_t padded = padded_positions(g), area = g->out_height * g->out_width;
    float least = g->relu ? 0 : -INFINITY;
    if (is_matrix(g))
        transpose(sums + from * padded, padded, y + from, g->filters, to - from, count, least);
    else if (g->pool == 1 && g->samples == 1)
        write_pooled(sums, y, count, g, from, to, 1, 1);
    else if (g->pool == 1)
        for (int64_t f = from; f < to; f++)
            for (int64_t h = 0; h < g->out_height; h++)
                transpose(sums + f * padded + h * g->columns * g->samples, g->samples,
                          y + f * area + h * g->out_width, g->filters * area, g->out_width, count,
                          least);
    else if (g->pool == 2 && g->samples == 1)
        write_pooled(sums, y, count, g, from, to, 2, 1);
    else
        write_pooled(sums, y, count, g, from, to, g->pool, g->samples);
}

/* The first filter of a part when all non-zero weights are shared out evenly. */
static int64_t share(const int64_t *starts, int64_t filters, int64_t part, int64_t parts) {
    int64_t low = 0, high = filters, wanted = starts[filters] * part / parts;
    if (part == parts) return filters;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (starts[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* One sample of a linear layer: a gathered dot product for each filter. */
static void dot_products(const float *x, float *y, const int64_t *starts, const int32_t *offset,
                         const float *weight, const float *bias, int64_t relu, int64_t from,
                         int64_t to) {
    enum { SUMS = 8 };
    for (int64_t f = from; f < to; f++) {
        float sum[SUMS] = {bias[f]};
        int64_t j = starts[f], end = starts[f + 1];
        for (; j + SUMS <= end; j += SUMS)
            for (int s = 0; s < SUMS; s++) sum[s] += weight[j + s] * x[offset[j + s]];
        for (; j < end; j++) sum[0] += weight[j] * x[offset[j]];
        for (int s = 1; s < SUMS; s++) sum[0] += sum[s];
        y[f] = relu && sum[0] < 0 ? 0 : sum[0];
    }
}

/* Bytes of input, for one channel, that a tile of so many vectors reads: some rows, or if they
 * are short all that lies between them too. */
static int64_t tile_bytes(const geometry *g, int64_t vectors) {
    int64_t more_rows = g->rows - g->out_height;
    int64_t row = vectors * LANES + (g->columns - g->out_width) * g->samples;
    int64_t apart = (more_rows + 1) * row;
    int64_t together = more_rows * g->columns * g->samples + row;
    return 4 * g->phases_h * g->phases_w * (apart < together ? apart : together);
}

/* Vectors of a tile: many, so that a weight is loaded for many outputs, but no more than keep the
 * input of all channels near; and tiles of like width. */
static int64_t tile_vectors(const geometry *g) {
    int64_t vectors = padded_positions(g) / LANES, most = MAX_TILE;
    while (most > 4 && g->channels * tile_bytes(g, most) > SECOND_CACHE) most--;
    return ceil_div(vectors, ceil_div(vectors, most));
}

/* Floats of working memory that a layer needs. */
int64_t sparse_scratch(const geometry *g) {
    return laid_out(g) + LANES + g->filters * padded_positions(g);
}

/* How many of `count` samples to put side by side; g->samples must be 1. */
int64_t sparse_group(const geometry *g, int64_t count) {
    if (count_positions(g) >= MAX_TILE * LANES) return 1;
    int64_t group = SCRATCH / (4 * sparse_scratch(g));
    return clamp(group / LANES * LANES, count < LANES ? count : LANES, count);
}

/* Channels are worked off in blocks whose input stays in the first cache while all filters pass,
 * if each filter has enough weights there to be worth the visit. Returns channels of a block; all
 * where dot products read one sample. */
int64_t sparse_block(const geometry *g, int64_t weights) {
    if (is_matrix(g) && g->samples == 1) return g->channels;
    int64_t blocks = ceil_div(g->channels * tile_bytes(g, tile_vectors(g)), FIRST_CACHE);
    blocks = clamp(weights / (WEIGHTS_A_VISIT * g->filters), 1, clamp(blocks, 1, g->channels));
    return ceil_div(g->channels, blocks);
}

/* One layer. Weights are sorted by block of channels, then by filter: filter f has those of block b
 * in [starts[b * filters + f], starts[b * filters + f + 1]), and totals[f] weights come before f.
 * Mirrored field by field in direct.py. */
typedef struct {
    const int64_t *totals, *starts;
    const int32_t *offset;
    const float *weight, *bias;
    const geometry *g;
    int64_t samples, blocks;
    int64_t alone;                             /* 1 if one thread works it off, else 0 */
} layer;

static void barrier(int64_t parts) {
#ifdef _OPENMP
    if (parts > 1) {
#pragma omp barrier
    }
#endif
}

/* A part of a layer; all parts run at the same time. */
static void forward(const float *x, float *y, float *scratch, const layer *l, int64_t part,
                    int64_t parts) {
    const geometry *g = l->g;
    int64_t positions = count_positions(g), padded = padded_positions(g);
    int64_t vectors = padded / LANES, in_tile = tile_vectors(g);
    int64_t inputs = g->channels * g->height * g->width;
    int64_t outputs = g->filters * (g->out_height / g->pool) * (g->out_width / g->pool);
    int64_t from = share(l->totals, g->filters, part, parts);
    int64_t to = share(l->totals, g->filters, part + 1, parts);
    int64_t first = g->channels * part / parts, last = g->channels * (part + 1) / parts;
    float *sums = scratch + laid_out(g) + LANES;
    if (l->samples == 1 && is_matrix(g)) {
        dot_products(x, y, l->starts, l->offset, l->weight, l->bias, g->relu, from, to);
        return;
    }
    if (part == 0) memset(sums - LANES, 0, LANES * sizeof(float)); /* the last tile reads so far */
    for (int64_t n = 0; n < l->samples; n += g->samples) {
        int64_t count = l->samples - n < g->samples ? l->samples - n : g->samples;
        lay_out(x + n * inputs, count, scratch, g, first, last);
        barrier(parts);
        for (int64_t v = 0; v < vectors; v += in_tile) {
            int64_t p = v * LANES;
            int64_t wide = vectors - v < in_tile ? vectors - v : in_tile;
            tile multiply = positions - p <= LANES / 2 ? TILES[0] : TILES[wide];
            for (int64_t b = 0; b < l->blocks; b++) {
                const int64_t *s = l->starts + b * g->filters;
                for (int64_t f = from; f < to; f++)
                    multiply(scratch + p, l->offset + s[f], l->weight + s[f], s[f + 1] - s[f],
                             b == 0 ? l->bias + f : NULL, sums + f * padded + p);
            }
        }
        write_out(sums, y + n * outputs, count, g, from, to);
        if (n + count < l->samples) barrier(parts);
    }
}

/* Layers one after the other. What lies between them is in two buffers of `length` floats, in turn,
 * that follow the working memory of `scratch` floats. */
void sparse_run(const float *x, float *y, float *memory, int64_t scratch, int64_t length,
                const layer *layers, int64_t count, int64_t threads) {
    int64_t shared = 0;
    for (int64_t i = 0; i < count; i++) shared += !layers[i].alone;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1 && shared)
#endif
    {
        int64_t part = 0, parts = 1;
#ifdef _OPENMP
        part = omp_get_thread_num();
        parts = omp_get_num_threads();
#endif
        const float *from = x;
        for (int64_t i = 0; i < count; i++) {
            const layer *l = layers + i;
            float *to = i + 1 == count ? y : memory + scratch + i % 2 * length;
            if (!l->alone)
                forward(from, to, memory, l, part, parts);
            else if (part == 0)
                forward(from, to, memory, l, 0, 1);
            if (i + 1 < count) barrier(parts);
            from = to;
        }
    }
}
