// Convolutions along time in fewer products, by Toom and Cook's method (Winograd's, for convolutions): `frames` results
// of `taps` taps take frames + taps - 1 products in place of frames * taps. All in fp32.
//
// A tile is `points` frames of the input. `before` turns each tile into `points` numbers, which are multiplied by the
// weight's own, turned once, and added up over channels; `after` makes the results of what is added up. More taps than
// one tile has are several chunks, whose products are added up before `after`: with as many results as taps, the tile
// of one chunk is the next tile of the chunk before. Frames `dilation` apart are a signal of their own each (a phase).
//
// [points] matrices of [tiles][inputs], each times [inputs][outputs]: a piece of the signal at a time, so that it stays
// in a core's cache, and a panel of outputs at a time.
#include <new>

#include "kernels.h"
#include "simd.h"
#include "threads.h"

namespace KERNELS_LEVEL {
namespace {

constexpr int64_t COLUMNS = 32;                     // outputs of a panel
constexpr int64_t MOST_POINTS = 8;                  // of a tile
constexpr int TALL = MANY_REGISTERS ? 12 : 6;       // tiles that are multiplied at once
constexpr int64_t PIECE_BYTES = 384 << 10;          // of a piece's turned tiles, about half of a core's cache

// Memory of each thread, kept between calls.
struct Pieces {
  Buffer<float> signal, turned, sums, results;
  int64_t signal_size, turned_size, sums_size, results_size;
};

// A piece: `tiles` of each phase.
struct Plan {
  int64_t line;    // numbers between two tiles' turned channels, and between two frames of a copied signal
  int64_t tiles;   // of a phase in a piece
  int64_t pieces;  // of a signal
  int64_t frames(const ShortConvolution& l) const { return l.dilation * l.frames * tiles; }
  int64_t turned(const ShortConvolution& l) const { return tiles + l.chunks - 1; }
};

Plan plan_of(const ShortConvolution& l, const ConvolutionCall& call, int64_t threads) {
  Plan plan;
  plan.line = up_to(l.inputs, LANES) + 16;  // no power of two, whose lines share places in a cache
  const int64_t bytes = l.points * l.dilation * plan.line * int64_t(sizeof(float));
  const int64_t room = most<int64_t>(1, PIECE_BYTES / (bytes * TALL));
  const int64_t whole = (call.results + l.dilation * l.frames - 1) / (l.dilation * l.frames);  // tiles of a phase
  plan.tiles = least(room * TALL, up_to(whole, TALL));
  // As few pieces as fit, but as many as keep all threads at work.
  int64_t pieces = (whole + plan.tiles - 1) / plan.tiles;
  const int64_t most_pieces = (whole + TALL - 1) / TALL;
  while (call.batch * pieces % threads && pieces < most_pieces && pieces < 4 * threads) pieces++;
  plan.tiles = least(plan.tiles, up_to((whole + pieces - 1) / pieces, TALL));
  plan.pieces = (whole + plan.tiles - 1) / plan.tiles;
  return plan;
}

bool fit(Pieces& s, const ShortConvolution& l, const Plan& plan, int64_t threads) {
  const int64_t frames = l.dilation * (l.frames * (plan.turned(l) - 1) + l.points);
  s.signal_size = frames * plan.line;
  s.turned_size = l.points * l.dilation * (plan.turned(l) + TALL) * plan.line;
  s.sums_size = l.points * l.dilation * plan.tiles * COLUMNS;
  s.results_size = plan.frames(l) * COLUMNS;
  return s.signal.fit(threads * s.signal_size) && s.turned.fit(threads * s.turned_size) &&
         s.sums.fit(threads * s.sums_size) && s.results.fit(threads * s.results_size);
}

// The signal's frames from `first` on as [frames][line], with zeros where there is none.
void copy_signal(const ConvolutionCall& call, const float* x, int64_t first, int64_t frames, int64_t inputs,
                 int64_t line, float* to) {
  const int64_t begin = least(most<int64_t>(0, -first), frames), end = most(begin, least(frames, call.length - first));
  memset(to, 0, size_t(begin * line) * sizeof(float));
  memset(to + end * line, 0, size_t((frames - end) * line) * sizeof(float));
  const float* from = x + first * call.x_frame;
  if (call.x_channel == 1) {
    for (int64_t f = begin; f < end; f++) memcpy(to + f * line, from + f * call.x_frame, size_t(inputs) * sizeof(float));
    return;
  }
  int64_t c = 0;
  for (; call.x_frame == 1 && c + LANES <= inputs; c += LANES) {  // as it lies: squares of channels and frames
    int64_t f = begin;
    for (; f + LANES <= end; f += LANES) {
      vec square[LANES];
      for (int i = 0; i < LANES; i++) square[i] = load(from + (c + i) * call.x_channel + f);
      transpose(square);
      for (int i = 0; i < LANES; i++) store(to + (f + i) * line + c, square[i]);
    }
    for (; f < end; f++)
      for (int i = 0; i < LANES; i++) to[f * line + c + i] = from[(c + i) * call.x_channel + f];
  }
  for (; c < inputs; c++)
    for (int64_t f = begin; f < end; f++) to[f * line + c] = from[c * call.x_channel + f * call.x_frame];
}

// [points][inputs] of a tile, whose frames lie `step` apart; the points lie `apart`.
template <int POINTS>
void turn(const float* before, const float* from, int64_t step, int64_t inputs, float* to, int64_t apart) {
  for (int64_t c = 0; c < inputs; c += LANES) {
    vec d[POINTS];
    for (int j = 0; j < POINTS; j++) d[j] = load(from + j * step + c);
    for (int p = 0; p < POINTS; p++) {
      vec sum = before[p * POINTS] * d[0];
      for (int j = 1; j < POINTS; j++) sum += before[p * POINTS + j] * d[j];
      store(to + p * apart + c, sum);
    }
  }
}

typedef void Turn(const float*, const float*, int64_t, int64_t, float*, int64_t);

Turn* turn_of(int64_t points) {
  switch (points) {
    case 3: return turn<3>;
    case 4: return turn<4>;
    case 5: return turn<5>;
    case 6: return turn<6>;
    case 7: return turn<7>;
    default: return turn<8>;
  }
}

// sums[ROWS][COLUMNS] = rows of the turned signal, `line` apart, times a panel [chunks][inputs][COLUMNS]
template <int ROWS>
void multiply(const float* rows, int64_t line, const float* panel, int64_t inputs, int64_t chunks, float* sums) {
  for (int64_t at = 0; at < COLUMNS; at += 2 * LANES) {
    vec s[ROWS][2] = {};
    const float* w = panel + at;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const float* a = rows + chunk * line;
      for (int64_t k = 0; k < inputs; k++, w += COLUMNS) {
        const vec w0 = load(w), w1 = load(w + LANES);
        for (int r = 0; r < ROWS; r++) {
          const float value = a[r * line + k];
          s[r][0] += value * w0;
          s[r][1] += value * w1;
        }
      }
    }
    for (int r = 0; r < ROWS; r++) {
      store(sums + r * COLUMNS + at, s[r][0]);
      store(sums + r * COLUMNS + at + LANES, s[r][1]);
    }
  }
}

struct Piece {
  const ShortConvolution& l;
  const ConvolutionCall& call;
  const Plan& plan;
  float *signal, *turned, *sums, *results;  // of this thread

  void compute(int64_t batch, int64_t number) const {
    const int64_t first = number * plan.frames(l);  // frame of the results
    const int64_t left = call.results - first, step = l.dilation * l.frames;
    const int64_t tiles = least(plan.tiles, up_to((left + step - 1) / step, TALL)), rows = tiles + l.chunks - 1;
    turn_signal(batch, first, rows);
    for (int64_t column = 0; column < l.outputs; column += COLUMNS) {
      const float* panel = l.w + column * l.points * l.chunks * l.inputs;
      const int64_t size = l.chunks * l.inputs * COLUMNS;
      for (int64_t p = 0; p < l.points; p++)
        for (int64_t phase = 0; phase < l.dilation; phase++)
          for (int64_t tile = 0; tile < tiles; tile += TALL)
            multiply<TALL>(turned + ((p * l.dilation + phase) * rows + tile) * plan.line, plan.line, panel + p * size,
                           l.inputs, l.chunks, sums + ((p * l.dilation + phase) * tiles + tile) * COLUMNS);
      finish(batch, first, least(left, plan.frames(l)), tiles, column);
    }
  }

 private:
  void turn_signal(int64_t batch, int64_t first, int64_t rows) const {
    const int64_t begin = first - l.padding, frames = l.dilation * (l.frames * (rows - 1) + l.points);
    const float* x = call.x + batch * call.x_batch;
    const float* from = x + begin * call.x_frame;
    int64_t line = call.x_frame;
    const bool as_it_lies = call.x_channel == 1 && l.inputs % LANES == 0 && begin >= 0 && begin + frames <= call.length;
    if (!as_it_lies) {
      copy_signal(call, x, begin, frames, l.inputs, plan.line, signal);
      from = signal;
      line = plan.line;
    }
    Turn* const turn = turn_of(l.points);
    for (int64_t phase = 0; phase < l.dilation; phase++)
      for (int64_t tile = 0; tile < rows; tile++)
        turn(l.before, from + (phase + l.dilation * l.frames * tile) * line, l.dilation * line, l.inputs,
             turned + (phase * rows + tile) * plan.line, l.dilation * rows * plan.line);
  }

  // The results of a panel from its sums.
  void finish(int64_t batch, int64_t first, int64_t frames, int64_t tiles, int64_t column) const {
    const int64_t wide = least(COLUMNS, call.outputs - column), apart = l.dilation * tiles * COLUMNS;
    const int64_t place = batch * call.y_batch + column * call.y_channel + first * call.y_frame;
    float* const y = call.y + place;
    const float* const plus = call.plus ? call.plus + place : nullptr;
    const float slope = float(call.slope);
    const bool direct = call.y_channel == 1 && wide == COLUMNS;
    for (int64_t phase = 0; phase < l.dilation; phase++)
      for (int64_t tile = 0; tile < tiles; tile++) {
        const float* from = sums + (phase * tiles + tile) * COLUMNS;
        for (int64_t i = 0; i < l.frames; i++) {
          const int64_t frame = phase + l.dilation * (l.frames * tile + i);
          if (frame >= frames) break;
          float* to = direct ? y + frame * call.y_frame : results + frame * COLUMNS;
          const float* after = l.after + i * l.points;
          for (int64_t at = 0; at < COLUMNS; at += LANES) {
            vec sum = after[0] * load(from + at);
            for (int64_t p = 1; p < l.points; p++) sum += after[p] * load(from + p * apart + at);
            if (l.bias) sum += load(l.bias + column + at);
            if (direct) {
              if (plus) sum += load(plus + frame * call.y_frame + at);
              if (slope != 1.0f) sum = sum < 0.0f ? sum * slope : sum;
            }
            store(to + at, sum);
          }
        }
      }
    if (direct) return;
    int64_t c = 0;
    for (; call.y_frame == 1 && c + LANES <= wide; c += LANES) {
      int64_t f = 0;
      for (; f + LANES <= frames; f += LANES) {
        vec square[LANES];
        for (int i = 0; i < LANES; i++) square[i] = load(results + (f + i) * COLUMNS + c);
        transpose(square);
        for (int i = 0; i < LANES; i++) {
          const int64_t at = (c + i) * call.y_channel + f;
          const vec sum = plus ? square[i] + load(plus + at) : square[i];
          store(y + at, sum < 0.0f ? sum * slope : sum);
        }
      }
      for (int i = 0; i < LANES; i++) put_one_by_one(y, plus, slope, c + i, f, frames);
    }
    for (; c < wide; c++) put_one_by_one(y, plus, slope, c, 0, frames);
  }

  void put_one_by_one(float* y, const float* plus, float slope, int64_t channel, int64_t frame, int64_t frames) const {
    for (; frame < frames; frame++) {
      const int64_t at = channel * call.y_channel + frame * call.y_frame;
      const float sum = results[frame * COLUMNS + channel] + (plus ? plus[at] : 0.0f);
      y[at] = sum < 0.0f ? sum * slope : sum;
    }
  }
};

}  // namespace

int short_convolution(const ShortConvolution& l, const ConvolutionCall& call, int threads) {
  Borrowed<Pieces> borrowed;
  const Plan plan = plan_of(l, call, threads);
  if (!borrowed.get() || !fit(*borrowed.get(), l, plan, threads)) return NO_MEMORY;
  Pieces& s = *borrowed.get();
  const int64_t tasks = call.batch * plan.pieces;
  in_team(threads, [&](Team team) {
    const Piece piece = {l, call, plan, s.signal.data() + team.me * s.signal_size,
                         s.turned.data() + team.me * s.turned_size, s.sums.data() + team.me * s.sums_size,
                         s.results.data() + team.me * s.results_size};
    for (int64_t i = tasks * team.me / team.all; i < tasks * (team.me + 1) / team.all; i++)
      piece.compute(i / plan.pieces, i % plan.pieces);
  });
  return 0;
}

}  // namespace KERNELS_LEVEL
