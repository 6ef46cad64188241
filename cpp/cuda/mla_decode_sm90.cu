// Latent attention for decode on Hopper: src/tokenspeed/kernels/contract.py says what, this is how.
// Rule: raw PTX, a plain C ABI of pointers and sizes, nothing of torch, nothing of the
// host's state.
//
// One block an SM, for good. A block walks its share of the keys (mla_plan.cuh) page by page:
//   producers   a warp for pages, by TMA, two pages ahead, and one for queries
//   scores      one warpgroup: S = Q K^T, the running maximum and sum, P
//   values      two warpgroups: each takes P into registers, and adds P V to its half of O, half
//               of that while the next page is scored and the other while it is weighed
// A tile is 64 rows, a row is a query token and a head, so that a key is read once for all of them.
// What is split over blocks they merge in the same launch (mla_merge.cuh).

#include "mla_block.cuh"

namespace {

constexpr int kBox = kRows * 128;  // bytes of 64 rows of 64 columns
constexpr int kPage = 9 * kBox;    // bytes of 64 keys
constexpr int kStages = 2;
// A page comes and goes in pieces: the rotary box, which nobody needs once it is scored, then two
// boxes of values each. The halves of O are done with pieces 1 and 2 before they are with 3 and 4.
constexpr int kPieces = 5;
// A maximum may lag behind by 2 before O is rescaled. The more it may, the less the heaviest weight
// is like 1, which alone is not rounded: the error is 1.85e-3 at 2^0, 1.9e-3 at 2^1, 2.1e-3 at 2^8.
// Where keys are few and one weighs much, 2^1 is too much too.
constexpr float kLazy = 1.0f;
constexpr int kExact = 16;  // pages before which no maximum lags

struct alignas(1024) Shared {
  uint8_t q[kTile];
  uint8_t pages[kStages][kPage];
  uint8_t weights[kBox];
  float fade[kRows];
  float inverse[kRows];
  Notes notes;
  Meeting meeting;
  uint64_t full[kStages][kPieces], empty[kStages][kPieces];
  uint64_t scored[2];
};

// The first box of a piece, and how many it has.
__device__ constexpr int box_of(int piece) {
  return piece == 0 ? 8 : (piece - 1) % 2 * 4 + (piece - 1) / 2 * 2;
}
__device__ constexpr int boxes_of(int piece) {
  return piece == 0 ? 1 : 2;
}

// --- The roles
// ------------------------------------------------------------------------------------

// One copy a piece: copies and barriers are slow to issue, and the page after waits for them.
__device__ void load_pieces(Shared& shared, const Maps& maps, uint64_t policy, int turn, int page) {
  const int stage = turn % kStages;
  for (int piece = 0; piece < kPieces; ++piece) {
    uint64_t* full = &shared.full[stage][piece];
    wait(&shared.empty[stage][piece], (turn / kStages & 1) ^ 1);
    expect(full, boxes_of(piece) * kBox);
    load_box(shared.pages[stage] + box_of(piece) * kBox, piece ? &maps.values : &maps.rotary, full,
             policy, 0, box_of(piece), page);
  }
}

// Scores the keys of a page, piece by piece as they come; under way when this returns.
__device__ void score_page(float (&s)[32], Shared& shared, int turn) {
  const int stage = turn % kStages;
  const uint32_t q = rows_of(shared.q), keys = rows_of(shared.pages[stage]);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    wait(&shared.full[stage][piece], turn / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < boxes_of(piece) * 4; ++k) {
      const int box = box_of(piece) + k / 4, step = k % 4 * 32;
      wgmma_64x64<kEight>(s, q + bytes_on(box * 1024 + step), keys + bytes_on(box * kBox + step),
                          piece + k != 0);
    }
  }
  wgmma_commit();
}

// Where a lane has 8 weights of a warp's 16 rows, of the columns from 8 n on or the 8 after these.
__device__ uint8_t* place_of_weights(Shared& shared, int n) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  return shared.weights + row * 128 + ((n + lane / 16) ^ (row % 8)) * 16;
}

// Of a thread's two rows of a tile.
struct Rows {
  int mine[2], limit[2];
  float best[2], total[2];
};

// Scores become weights.
__device__ void weigh(const Call& call, Shared& shared, Rows& rows, float (&s)[32], int turn,
                      const Item& item, int block) {
  const int lane = threadIdx.x % 32;
  const int key = block * kKeys + lane % 4 * 2;
  const float lag = block - item.first < kExact ? 0.0f : kLazy;
  float fade[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if ((block + 1) * kKeys > rows.limit[i]) {
#pragma unroll
      for (int n = 0; n < 16; ++n)
        if (key + n / 2 * 8 + n % 2 >= rows.limit[i]) s[n / 2 * 4 + i * 2 + n % 2] = -INFINITY;
    }
    float high[4];
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float one = s[n / 2 * 4 + i * 2 + n % 2];
      high[n % 4] = n < 4 ? one : fmaxf(high[n % 4], one);
    }
    high[0] = fmaxf(fmaxf(high[0], high[1]), fmaxf(high[2], high[3]));
    high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 1));
    high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 2)) * call.scale_log2;
    fade[i] = 1.0f;
    float& best = rows.best[i];
    if (high[0] > best + lag) {
      fade[i] = exp2_fast(best - high[0]);
      best = high[0];
    }
    const float base = best == -INFINITY ? 0.0f : best;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      float& p = s[n / 2 * 4 + i * 2 + n % 2];
      p = exp2_fast(p * call.scale_log2 - base);
    }
  }
  wait(&shared.meeting.p_empty, (turn & 1) ^ 1);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (lane % 4 == 0) shared.fade[rows.mine[i]] = fade[i];
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* two = s + (n + k / 2) * 4 + k % 2 * 2;
      const __nv_bfloat162 pair = __floats2bfloat162_rn(two[0], two[1]);
      pairs[k] = reinterpret_cast<const uint32_t&>(pair);
    }
    store_matrices(place_of_weights(shared, n), pairs);
  }
  if ((block + 1) * kKeys > item.length) {
    sync_group(2, 128);  // all four warps have scored the keys
    clear_keys<8>(shared.pages[turn % kStages], item.length - block * kKeys);
    fence_async();
  }
  arrive(&shared.meeting.p_full);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n) sum += s[n / 2 * 4 + i * 2 + n % 2];
    rows.total[i] = rows.total[i] * fade[i] + sum;
  }
}

__device__ void score(const Call& call, Shared& shared) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int turn = 0, tiles_loaded = 0, tiles = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles) {
    const Item& item = walk.item;
    Rows rows{.best = {-INFINITY, -INFINITY}, .total = {}};
    for (int i = 0; i < 2; ++i) {
      rows.mine[i] = warp * 16 + lane / 4 + i * 8;
      rows.limit[i] = item.keys_seen(rows.mine[i], call.heads);
    }
    if (item.first < item.last) {
      if (tiles_loaded == 0) clear_rows(shared, item.rows);
      wait(&shared.meeting.q_full, tiles_loaded++ & 1);
    }
    for (int block = item.first; block < item.last; ++block, ++turn) {
      float s[32];
      score_page(s, shared, turn);
      if (lane == 0) arrive(&shared.scored[turn % 2]);
      wgmma_wait<0>();
      keep(s);
      if (lane == 0) {
        arrive(&shared.empty[turn % kStages][0]);
        if (block + 1 == item.last) arrive(&shared.meeting.q_empty);
      }
      weigh(call, shared, rows, s, turn, item, block);
    }
    wait(&shared.meeting.sum_empty, (tiles & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = rows.total[i] + __shfl_xor_sync(~0u, rows.total[i], 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) {
        shared.inverse[rows.mine[i]] = sum > 0.0f ? 1.0f / sum : 0.0f;
        const float log = log_of(rows.best[i], sum);
        if (rows.mine[i] < item.rows) {
          if (item.into < 0)
            call.lse[item.first_row + rows.mine[i]] = log * kLn2;
          else
            call.part_lse[(item.into + rows.mine[i]) * 4] = log;
        }
      }
    }
    arrive(&shared.meeting.sum_full);
  }
}

// Half of a row of a partial result, by four threads that have 64 columns of it each, in half
// precision, whose 11 bits add nothing to what bfloat16 loses later. The largest value becomes
// 2^14 to 2^15, so that none overflows; four threads' chunks of 8 columns lie beside each other.
__device__ void pack(const Call& call, int row, int half, const float (&o)[128], int i,
                     float inverse) {
  const int lane = threadIdx.x % 4;
  float high = 0.0f;
#pragma unroll
  for (int n = 0; n < 64; ++n) high = fmaxf(high, fabsf(o[n / 2 * 4 + i * 2 + n % 2]));
  high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
  high = fmaxf(high, __shfl_xor_sync(~0u, high, 2)) * inverse;
  const int exponent = max(__float_as_int(high) >> 23, 15);
  const float up = __int_as_float((268 - exponent) << 23) * inverse;
  if (row < 0) return;
  if (lane == 0) call.part_lse[row * 4 + 1 + half] = __int_as_float((exponent - 14) << 23);
  uint4* to = call.part_out + row * 64 + half * 32 + lane;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    __half2 pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* two = o + (n * 4 + k) * 4 + i * 2;
      pairs[k] = __floats2half2_rn(two[0] * up, two[1] * up);
    }
    to[n * 4] = *reinterpret_cast<uint4*>(pairs);
  }
}

__device__ void put(const Call& call, const Item& item, const float (&o)[128],
                    const float (&inverse)[2], const int (&mine)[2], int half) {
  const int column = half * 256 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool there = mine[i] < item.rows, none = item.first == item.last;
    if (item.into >= 0) {
      pack(call, there ? item.into + mine[i] : -1, half, o, i, inverse[i]);
    } else if (there) {
      __nv_bfloat16* to = call.out + int64_t(item.first_row + mine[i]) * kLatent + column;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const float a = none ? 0.0f : o[n * 4 + i * 2] * inverse[i];
        const float b = none ? 0.0f : o[n * 4 + i * 2 + 1] * inverse[i];
        *reinterpret_cast<__nv_bfloat162*>(to + n * 8) = __floats2bfloat162_rn(a, b);
      }
    }
  }
}

__device__ void mix(const Call& call, Shared& shared, int half) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int mine[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int turn = 0, tiles = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles) {
    const Item& item = walk.item;
    float o[128];
    for (int block = item.first; block < item.last; ++block, ++turn) {
      const int stage = turn % kStages;
      const uint8_t* values = shared.pages[stage] + half * 4 * kBox;
      for (int piece = 1 + half; piece < kPieces; piece += 2)
        wait(&shared.full[stage][piece], turn / kStages & 1);
      wait(&shared.meeting.p_full, turn & 1);
      const bool first = block == item.first;
      const float fade[2] = {shared.fade[mine[0]], shared.fade[mine[1]]};
      uint32_t weights[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) load_matrices(weights[k], place_of_weights(shared, k * 2));
      arrive(&shared.meeting.p_empty);
      if (!first && __any_sync(~0u, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < 128; ++n) o[n] *= fade[n / 2 % 2];
      }
      const uint32_t value = columns_of(values, kBox);
      keep(o);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<0>(o, weights[k], value + bytes_on(k * 2048), !first || k != 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) arrive(&shared.empty[stage][1 + half]);
      // The tensor cores have the next page's scores to do before, and nothing while it is weighed.
      if (block + 1 < item.last) wait(&shared.scored[(turn + 1) % 2], (turn + 1) / 2 & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<64>(o, weights[k], value + bytes_on(2 * kBox + k * 2048), !first || k != 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) arrive(&shared.empty[stage][3 + half]);
    }
    wait(&shared.meeting.sum_full, tiles & 1);
    const float inverse[2] = {shared.inverse[mine[0]], shared.inverse[mine[1]]};
    arrive(&shared.meeting.sum_empty);
    put(call, item, o, inverse, mine, half);
  }
}

struct Kind {
  using Shared = ::Shared;
  static constexpr int kLoadRegisters = 48, kSmallRegisters = 112, kLargeRegisters = 176;
  static constexpr int kBeside = 4;

  static __device__ void make_barriers(Shared& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
      for (int piece = 0; piece < kPieces; ++piece) {
        make_barrier(&shared.full[stage][piece], 1);
        make_barrier(&shared.empty[stage][piece], 4);
      }
    }
    for (auto& scored : shared.scored) make_barrier(&scored, 4);
  }

  static __device__ void load_page(Shared& shared, const Maps& maps, uint64_t policy, int turn,
                                   int page) {
    load_pieces(shared, maps, policy, turn, page);
  }

  static __device__ void take_page(Shared& shared, int turn, int group) {
    const int stage = turn % kStages;
    for (int piece = 0; piece < kPieces; ++piece) {
      const int taker = piece == 0 ? 1 : 2 + (piece - 1) % 2;
      if (group != taker) continue;
      wait(&shared.full[stage][piece], turn / kStages & 1);
      if (threadIdx.x % 32 == 0) arrive(&shared.empty[stage][piece]);
    }
  }

  static __device__ void small(const Call& call, Shared& shared) { score(call, shared); }

  static __device__ void large(const Call& call, Shared& shared, int half) {
    mix(call, shared, half);
  }

  static int make_maps(Maps& maps, const Given& given) {
    const Tensor pages{
        given.pages, {kKeys, 9, given.pages_count}, {given.key_stride, 64, given.page_stride}};
    if (int error = make_map(&maps.values, pages, kKeys, 2)) return error;
    return make_map(&maps.rotary, pages, kKeys, 1);
  }
};

}  // namespace

#include "mla_abi.cuh"
