// Latent attention for decode on Hopper over pages of 8 bits (e4m3), which take half the loads and
// would take as much arithmetic: so keys are the rows of products (they are 64 in any case), and
// queries the columns, 16 or 32 or 64 as there are.
// Rule: nothing of the pages is rounded; of a query what is below 2^-9 of its largest number is, to
// 2^-17 of that; weights are, to half precision. The tensor cores cut sums of 8-bit products off.
//
// A block walks its share of the keys page by page:
//   producers   a warp for pages, by TMA, four pages ahead, and one for queries
//   scores      one warpgroup: queries as sums of two numbers of 8 bits, S^T = K Q^T of the keys as
//               they lie, the running maximum and sum, P^T
//   values      two warpgroups: each widens its half of V^T to half precision, which has all
//               numbers of e4m3, and adds V^T P^T to its half of O^T
// Shares, groups and merging are those of mla_decode_sm90.cu.

#include "mla_block.cuh"

namespace {

constexpr int kBox = kKeys * 128;            // bytes of 64 keys of 128 columns
constexpr int kValues = 4 * kBox;            // of the columns that are values too
constexpr int kPage = kValues + kKeys * 64;  // behind them the rotary ones
constexpr int kStages = 4;
// What averages values of e4m3 is at most 448, and half precision has 128 times that.
constexpr float kUp = 128.0f;
// The heaviest key weighs 2^kRoom when it is found, so that half precision has weights down to
// 2^-34 of it, and as long as no weight of a page is above kMost nobody asks for the page's
// maximum.
constexpr float kRoom = 10.0f, kMost = 32768.0f;

// What the weights of a query's keys are made with: exp2(score * by - base).
struct alignas(8) Scaling {
  float by, base;
};

struct alignas(1024) Shared {
  uint8_t q[kTile];
  uint8_t pages[kStages][kPage];
  uint8_t weights[kRows * 128];  // [queries, keys]
  float of_warps[4][kRows];      // maxima, and in the end sums
  Scaling scaling[kRows];
  float fade[2][kRows];
  float inverse[kRows];
  int faded[2];  // whether any is not 1
  Notes notes;
  Meeting meeting;
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Shared) <= 227 * 1024);

// --- Queries
// --------------------------------------------------------------------------------------

// A tile of queries, by eights of rows: of 128 columns at a time high numbers, then low ones, and
// of the rotary ones in the end.
constexpr int kLow = 1024, kColumns = 2 * kLow, kLowRotary = 512;

// Eight numbers of bfloat16, times `up`, as sums of two of e4m3: bfloat16 has 8 bits, e4m3 4 and
// what is left 4 again.
__device__ void split(uint2& high, uint2& low, const uint4& eight, __nv_bfloat162 up) {
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&eight);
  uint32_t halves[2][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const __half2 two = __float22half2_rn(__bfloat1622float2(__hmul2(pairs[k], up)));
    halves[0][k] = narrow(two);
    halves[1][k] = narrow(__hsub2(two, widened(halves[0][k])));
  }
  high = uint2{halves[0][0] | halves[0][1] << 16, halves[0][2] | halves[0][3] << 16};
  low = uint2{halves[1][0] | halves[1][1] << 16, halves[1][2] | halves[1][3] << 16};
}

// Queries become sums of two, in place: of 16 rows at a time, of which a warp has four.
__device__ void split_rows(const Call& call, Shared& shared, int rows) {
  const int mine = threadIdx.x % 128, lane = mine % 32, chunk = lane % 8;
  const int quads = (rows + 7) / 8 * 2;
#pragma unroll 1
  for (int base = 0; base < quads; base += 4) {
    const int quad = base + mine / 32, row = quad % 2 * 4 + lane / 8;
    uint8_t* const at = shared.q + quad / 2 * kEight;
    uint4 eights[9];
    __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
#pragma unroll
    for (int box = 0; box < 9; ++box) {
      eights[box] =
          *reinterpret_cast<const uint4*>(at + box * 1024 + row * 128 + (chunk ^ row) * 16);
      const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&eights[box]);
#pragma unroll
      for (int k = 0; k < 4; ++k) most = __hmax2(most, __habs2(pairs[k]));
    }
    sync_group(2, 128);
    float high = fmaxf(__low2float(most), __high2float(most));
    for (int k = 4; k; k /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, k));
    // The largest becomes 2^7 to 2^8; a row of zeros stays.
    const int exponent = __float_as_int(high) >> 23;
    const bool plain = exponent < 16 || exponent > 254;
    const float up = plain ? 1.0f : __int_as_float((261 - exponent) << 23);
    const float down = exponent > 254 ? NAN : plain ? 1.0f : __int_as_float((exponent - 7) << 23);
    if (chunk == 0 && quad < quads) shared.scaling[quad * 4 + lane / 8].by = call.scale_log2 * down;
#pragma unroll
    for (int box = 0; box < 9; ++box) {
      uint2 one, rest;
      split(one, rest, eights[box], __float2bfloat162_rn(up));
      // Of 128 columns, or of the 64 rotary ones.
      const int eight = box % 2 * 8 + chunk, place = eight / 2, half = eight % 2 * 8;
      uint8_t* const to = box < 8 ? at + box / 2 * kColumns + row * 128 + (place ^ row) * 16 + half
                                  : at + 4 * kColumns + row * 64 + (place ^ row / 2) * 16 + half;
      *reinterpret_cast<uint2*>(to) = one;
      *reinterpret_cast<uint2*>(to + (box < 8 ? kLow : kLowRotary)) = rest;
    }
  }
  if (mine < kRows && mine >= quads * 4) shared.scaling[mine].by = 0.0f;
  fence_async();
  sync_group(2, 128);
}

// --- Scores
// ---------------------------------------------------------------------------------------

// The tensor cores cut each sum off behind 13 bits or so: shorter sums lose less, and what is small
// comes first.
template <int N>
constexpr int kSums = N == 64 ? 2 : 3;

template <int N>
__device__ void score_page(float (&to)[N / 2], const Shared& shared, int stage) {
  const uint32_t q = rows_of(shared.q), keys = rows_of(shared.pages[stage]);
  float s[kSums<N>][N / 2];
  wgmma_fence();
  constexpr int kSteps = 18 / kSums<N>;
#pragma unroll
  for (int i = 0; i < 36; ++i) {
    const int sum = i / (2 * kSteps), low = i / kSteps % 2 == 0, k = sum * kSteps + i % kSteps;
    const int add = i % (2 * kSteps) != 0;
    if (k < 16)
      wgmma_eight<kEight, false>(s[sum], keys + bytes_on(k / 4 * kBox + k % 4 * 32),
                                 q + bytes_on(k / 4 * kColumns + low * kLow + k % 4 * 32), add);
    else
      wgmma_eight<kEight, true>(s[sum], keys + bytes_on(kValues + k % 4 * 32),
                                q + bytes_on(4 * kColumns + low * kLowRotary + k % 4 * 32), add);
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int k = 0; k < kSums<N>; ++k) keep(s[k]);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    to[i] = s[0][i];
#pragma unroll
    for (int k = 1; k < kSums<N>; ++k) to[i] += s[k][i];
  }
}

// Of the queries 8 j + lane % 4 * 2 + i, which a thread has as x[2 j + i]: sums or maxima over the
// eight lanes that have the same ones. Each keeps half of what it has, and gives the other away.
template <int N, typename Join>
__device__ void reduce(float (&x)[N / 4], const Join& join) {
  const int lane = threadIdx.x % 32;
  int count = N / 4;
#pragma unroll
  for (int bit = 16; bit >= 4; bit /= 2) {
    if (count == 1) {
      x[0] = join(x[0], __shfl_xor_sync(~0u, x[0], bit));
      continue;
    }
    count /= 2;
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      if (i >= count) break;
      const float mine = lane & bit ? x[i + count] : x[i], other = lane & bit ? x[i] : x[i + count];
      x[i] = join(mine, __shfl_xor_sync(~0u, other, bit));
    }
  }
}

// Leaves what `reduce` left where a thread for each query finds it.
template <int N>
__device__ void leave(Shared& shared, const float (&x)[N / 4]) {
  const int lane = threadIdx.x % 32, eighth = lane / 4, t = lane % 4;
  float* const to = shared.of_warps[threadIdx.x / 32 % 4];
  if constexpr (N == 64)
    *reinterpret_cast<float2*>(to + 2 * lane) = float2{x[0], x[1]};
  else if constexpr (N == 32)
    to[eighth / 2 * 8 + t * 2 + eighth % 2] = x[0];
  else if (eighth % 2 == 0)
    to[eighth / 4 * 8 + t * 2 + eighth / 2 % 2] = x[0];
}

// Scores of keys that a query does not see.
template <int N>
__device__ void mask(float (&s)[N / 2], const Item& item, int block, int heads) {
  const int key = block * kKeys + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < N / 4; ++n) {
    const int limit = item.keys_seen(n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2, heads);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (key + i * 8 >= limit) s[n / 2 * 4 + i * 2 + n % 2] = -INFINITY;
  }
}

// Weights are made with the maximum from here on. `best`: of one query, for the first N threads.
template <int N>
__device__ void rescale(Shared& shared, float& best, float (&total)[N / 4], const float (&s)[N / 2],
                        int turn) {
  const int mine = threadIdx.x % 128, column = threadIdx.x % 4 * 2;
  float high[N / 4];
#pragma unroll
  for (int n = 0; n < N / 4; ++n) high[n] = fmaxf(s[n / 2 * 4 + n % 2], s[n / 2 * 4 + 2 + n % 2]);
  reduce<N>(high, [](float a, float b) { return fmaxf(a, b); });
  leave<N>(shared, high);
  sync_group(2, 128);
  if (mine < N) {
    const auto& warps = shared.of_warps;
    const float most = shared.scaling[mine].by * fmaxf(fmaxf(warps[0][mine], warps[1][mine]),
                                                       fmaxf(warps[2][mine], warps[3][mine]));
    const float last = best;
    best = last > most ? last : most;
    shared.fade[turn % 2][mine] = best > last ? exp2_fast(last - best) : 1.0f;
    shared.scaling[mine].base = best == -INFINITY ? 0.0f : best - kRoom;
  }
  sync_group(2, 128);
#pragma unroll
  for (int n = 0; n < N / 4; ++n) total[n] *= shared.fade[turn % 2][n / 2 * 8 + column + n % 2];
}

// Scores become weights; returns the largest of the thread.
template <int N>
__device__ float weigh(const Shared& shared, float (&s)[N / 2]) {
  const int column = threadIdx.x % 4 * 2;
  float high[4] = {};
#pragma unroll
  for (int n = 0; n < N / 4; ++n) {
    const Scaling scaling = shared.scaling[n / 2 * 8 + column + n % 2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float& p = s[n / 2 * 4 + i * 2 + n % 2];
      p = exp2_fast(p * scaling.by - scaling.base);
      high[n % 4] = fmaxf(high[n % 4], p);
    }
  }
  return fmaxf(fmaxf(high[0], high[1]), fmaxf(high[2], high[3]));
}

template <int N>
__device__ void store_weights(Shared& shared, const float (&p)[N / 2]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, matrix = lane / 8;
#pragma unroll
  for (int n = 0; n < N / 8; n += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* two = p + (n + k / 2) * 4 + k % 2 * 2;
      const __half2 pair = __floats2half2_rn(two[0], two[1]);
      pairs[k] = reinterpret_cast<const uint32_t&>(pair);
    }
    const int row = (n + matrix / 2) * 8 + lane % 8;
    store_transposed(shared.weights + row * 128 + ((warp * 2 + matrix % 2) ^ (lane % 8)) * 16,
                     pairs);
  }
}

// What is left of an item behind its last page: sums, and where they go.
template <int N>
__device__ void finish(const Call& call, Shared& shared, const float& best, float (&total)[N / 4],
                       const Item& item, int tiles) {
  const int mine = threadIdx.x % 128;
  reduce<N>(total, [](float a, float b) { return a + b; });
  leave<N>(shared, total);
  sync_group(2, 128);
  wait(&shared.meeting.sum_empty, (tiles & 1) ^ 1);
  if (mine < N) {
    const auto& warps = shared.of_warps;
    const float sum = (warps[0][mine] + warps[1][mine]) + (warps[2][mine] + warps[3][mine]);
    shared.inverse[mine] = sum > 0.0f ? 1.0f / sum : 0.0f;
    const float log = log_of(best - kRoom, sum);
    if (mine < item.rows) {
      if (item.into < 0)
        call.lse[item.first_row + mine] = log * kLn2;
      else
        *reinterpret_cast<float4*>(call.part_lse + (item.into + mine) * 4) =
            float4{log, 1.0f / kUp, 1.0f / kUp, 0.0f};
    }
  }
  sync_group(2, 128);  // sums have been read
  arrive(&shared.meeting.sum_full);
}

template <int N>
__device__ void score_item(const Call& call, Shared& shared, const Item& item, int& turn,
                           int tiles) {
  const int lane = threadIdx.x % 32;
  const int all_seen = item.first < item.last ? item.keys_seen(0, call.heads) : 0;
  float best = -INFINITY, total[N / 4] = {};
  for (int block = item.first; block < item.last; ++block, ++turn) {
    const int stage = turn % kStages;
    wait(&shared.full[stage], turn / kStages & 1);
    const bool partly = (block + 1) * kKeys > all_seen, first = block == item.first;
    float s[N / 2];
    score_page<N>(s, shared, stage);
    if (partly) mask<N>(s, item, block, call.heads);
    if (first) rescale<N>(shared, best, total, s, turn);
    const float high = weigh<N>(shared, s);
    const bool again = sync_any(2, 128, high > kMost);
    if (again) {  // scores are weights by now: once more
      score_page<N>(s, shared, stage);
      if (partly) mask<N>(s, item, block, call.heads);
      rescale<N>(shared, best, total, s, turn);
      weigh<N>(shared, s);
    }
    if (block + 1 == item.last && lane == 0) arrive(&shared.meeting.q_empty);
    if (threadIdx.x % 128 == 0) shared.faded[turn % 2] = first || again;
    wait(&shared.meeting.p_empty, (turn & 1) ^ 1);
    store_weights<N>(shared, s);
    if ((block + 1) * kKeys > item.length)
      clear_keys<4>(shared.pages[stage], item.length - block * kKeys);
    fence_async();
    arrive(&shared.meeting.p_full);
#pragma unroll
    for (int n = 0; n < N / 4; ++n) total[n] += s[n / 2 * 4 + n % 2] + s[n / 2 * 4 + 2 + n % 2];
  }
  finish<N>(call, shared, best, total, item, tiles);
}

// --- Values
// ---------------------------------------------------------------------------------------

// Products of a page with its weights: a step is 16 columns and 32 keys.
constexpr int kAhead = 2;  // steps that are widened before their product

// A step's rows of products of 16 keys: a thread's two rows are columns that lie beside each other.
using Step = uint32_t[2][4];

__device__ void widen_values(Step& to, const uint8_t* box, int step) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int chunk = warp % 2 * 4 + step / 2;
  uint32_t fours[4];
  load_transposed(fours, box + (step % 2 * 32 + lane) * 128 + (chunk ^ lane % 8) * 16);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    widen(to[i / 2][i % 2 * 2], to[i / 2][i % 2 * 2 + 1], __byte_perm(fours[i], 0, 0x3120));
}

// A thread has columns warp * 64 + i * 16 + 2 (lane / 4), and the next, of half of O, i = 0 to 3,
// of the queries 8 j + lane % 4 * 2 and the next: o[i][j * 4], and with the next column o[i][j * 4
// + 2].
template <int N>
__device__ void put(const Call& call, const Shared& shared, const Item& item,
                    const float (&o)[4][N / 2], int half) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N / 4; ++n) {
    const int row = n / 2 * 8 + lane % 4 * 2 + n % 2, at = n / 2 * 4 + n % 2;
    const float inverse = shared.inverse[row];
    if (row >= item.rows) continue;
    if (item.into >= 0) {
      __half2 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = __floats2half2_rn(o[i][at] * (inverse * kUp), o[i][at + 2] * (inverse * kUp));
      call.part_out[(item.into + row) * 64 + half * 32 + warp * 8 + lane / 4] =
          *reinterpret_cast<uint4*>(pairs);
    } else {
      __nv_bfloat16* const to = call.out + int64_t(item.first_row + row) * kLatent + half * 256 +
                                warp * 64 + lane / 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<__nv_bfloat162*>(to + i * 16) =
            __floats2bfloat162_rn(o[i][at] * inverse, o[i][at + 2] * inverse);
      }
    }
  }
}

template <int N>
__device__ void mix_page(const Shared& shared, float (&o)[4][N / 2], Step (&steps)[kAhead],
                         const uint8_t* box) {
  const uint32_t p = rows_of(shared.weights);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i >= kAhead) {
      wgmma_wait<kAhead - 1>();
      widen_values(steps[i % kAhead], box, i);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k)
      wgmma_half(o[i / 2], steps[i % kAhead][k], p + bytes_on((i % 2 * 2 + k) * 32));
    wgmma_commit();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) keep(o[i]);
}

template <int N>
__device__ void mix_item(const Call& call, Shared& shared, const Item& item, int half, int& turn,
                         int tiles) {
  const int lane = threadIdx.x % 32;
  float o[4][N / 2] = {};
  for (int block = item.first; block < item.last; ++block, ++turn) {
    const int stage = turn % kStages;
    wait(&shared.full[stage], turn / kStages & 1);
    const uint8_t* const box = shared.pages[stage] + (half * 2 + threadIdx.x / 64 % 2) * kBox;
    // Before the weights come, unless what is behind the last key is not cleared yet.
    if ((block + 1) * kKeys > item.length) wait(&shared.meeting.p_full, turn & 1);
    Step steps[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) widen_values(steps[i], box, i);
    wait(&shared.meeting.p_full, turn & 1);
    if (shared.faded[turn % 2]) {
#pragma unroll
      for (int n = 0; n < N / 4; ++n) {
        const float fade = shared.fade[turn % 2][n / 2 * 8 + lane % 4 * 2 + n % 2];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          o[i][n / 2 * 4 + n % 2] *= fade, o[i][n / 2 * 4 + 2 + n % 2] *= fade;
      }
    }
    mix_page<N>(shared, o, steps, box);
    arrive(&shared.meeting.p_empty);
    arrive(&shared.empty[stage]);
  }
  wait(&shared.meeting.sum_full, tiles & 1);
  put<N>(call, shared, item, o, half);
  arrive(&shared.meeting.sum_empty);
}

// --- What a block does with them
// ------------------------------------------------------------------

// `take` with the number of queries that products are made for.
template <typename Take>
__device__ void by_width(const Item& item, const Take& take) {
  if (item.rows <= 16)
    take.template operator()<16>();
  else if (item.rows <= 32)
    take.template operator()<32>();
  else
    take.template operator()<64>();
}

struct Kind {
  using Shared = ::Shared;
  static constexpr int kLoadRegisters = 40, kSmallRegisters = 120, kLargeRegisters = 176;
  static constexpr int kBeside = 8;

  static __device__ void make_barriers(Shared& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
      make_barrier(&shared.full[stage], 1);
      make_barrier(&shared.empty[stage], 256);
    }
  }

  static __device__ void load_page(Shared& shared, const Maps& maps, uint64_t policy, int turn,
                                   int page) {
    const int stage = turn % kStages;
    uint64_t* const full = &shared.full[stage];
    wait(&shared.empty[stage], (turn / kStages & 1) ^ 1);
    expect(full, kPage);
    load_box(shared.pages[stage], &maps.values, full, policy, 0, 0, page);
    load_box(shared.pages[stage] + kValues, &maps.rotary, full, policy, 0, 0, page);
  }

  static __device__ void take_page(Shared& shared, int turn, int group) {
    if (group == 1) return;
    const int stage = turn % kStages;
    wait(&shared.full[stage], turn / kStages & 1);
    arrive(&shared.empty[stage]);
  }

  static __device__ void small(const Call& call, Shared& shared) {
    int turn = 0, tiles_loaded = 0, tiles = 0;
    for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles) {
      const Item& item = walk.item;
      if (item.first < item.last) {
        if (tiles_loaded == 0) clear_rows(shared, item.rows);
        wait(&shared.meeting.q_full, tiles_loaded++ & 1);
        split_rows(call, shared, item.rows);
      }
      by_width(item, [&]<int N>() { score_item<N>(call, shared, item, turn, tiles); });
    }
  }

  static __device__ void large(const Call& call, Shared& shared, int half) {
    int turn = 0, tiles = 0;
    for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles)
      by_width(walk.item,
               [&]<int N>() { mix_item<N>(call, shared, walk.item, half, turn, tiles); });
  }

  static int make_maps(Maps& maps, const Given& given) {
    const auto* const base = static_cast<const uint8_t*>(given.pages);
    const Tensor values{
        base, {kKeys, 4, given.pages_count}, {given.key_stride, 128, given.page_stride}, 128, 1};
    const Tensor rotary{base + kLatent,
                        {kKeys, 1, given.pages_count},
                        {given.key_stride, 64, given.page_stride},
                        64,
                        1};
    if (int error = make_map(&maps.values, values, kKeys, 4)) return error;
    return make_map(&maps.rotary, rotary, kKeys, 1);
  }
};

}  // namespace

#include "mla_abi.cuh"
