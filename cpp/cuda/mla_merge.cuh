// What is split over blocks they merge in the same launch: each has a partial result of its keys,
// waits for the others of its tile and takes a share of the tile. The launch is cooperative, so all
// of them are running.
// Rule: sums run in the order of the keys, whoever comes first.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "hopper.cuh"
#include "mla_plan.cuh"

namespace {

constexpr int kConsumers = 384;
constexpr int kSlots = 24;  // halves of rows on their way to a warp
constexpr int kNoted = 4;

constexpr float kLn2 = 0.6931471805599453f;

// Of a sum of powers of two, in powers of two; of nothing -inf, and of NaN NaN.
__device__ inline float log_of(float base, float sum) {
  return sum > 0.0f ? base + log2f(sum) : sum == 0.0f ? -INFINITY : NAN;
}

// Lies where Q and the pages were.
struct Merging {
  uint4 slots[kWarps][kSlots][32];
  float4 weights[kWarps][2 * kBlocksMax];  // lse, then the weights of the halves
  float sums[kWarps][8][32];
};

// What a block has a part of: found out while others still work, and kept near, since what was
// loaded before a fence is loaded again after it.
struct Notes {
  Item items[kNoted];  // the first ones
  int count;
  unsigned launch;  // of this plan, from 0 on
};

struct Call {
  Plan plan;
  __nv_bfloat16* out;  // [tokens, heads, 512]
  float* lse;          // [tokens, heads]
  uint4* part_out;     // [rows of partial results, 64]: Item::into; in half precision, by chunks
  float* part_lse;     // [the same rows, 4]: lse in powers of two, and what to scale the halves by
  int heads;
  float scale_log2;
};

// The parts of what the row `q_row` of a group does not share; none have no count.
__device__ Split own_parts(const Call& call, const Item& item, int q_row) {
  const Plan& plan = call.plan;
  const int lane = threadIdx.x % 32, token = q_row / call.heads;
  const int* starts = plan.query_start + item.row;
  const int members = plan.members[item.row];
  int row = 0;
  for (int base = 0; base < members; base += 32) {
    const bool earlier = base + lane < members && __ldg(starts + base + lane + 1) <= token;
    row += __popc(__ballot_sync(~0u, earlier));
  }
  const int at = q_row - __ldg(starts + row) * call.heads;
  row += item.row;
  const auto& planned = plan.phase[kAlone];
  Split split(plan, kAlone, plan.lanes(kAlone), planned.split_first[row], planned.split_count[row],
              at / kRows, at % kRows, q_row);
  if (plan.blocks(kAlone, row) == 0) split.count = 0;
  return split;
}

// A chunk of a partial result is four pairs of columns; the pairs of `Beside` chunks lie beside
// each other in the result. A warp sums `Wide` halves of one row over every `groups`th part; groups
// of warps share a row. All that fits is on its way at once, and few instructions stand between:
// each step here waits for the last one, and no other block's work hides it.
template <int Beside, int Wide>
__device__ void merge_tile(const Call& call, const Item& item, Merging& shared, int groups,
                           int at_once) {
  constexpr int kSome = kSlots / Wide;  // parts at a time
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int mine = warp * at_once / kWarps, group = warp - mine * groups;
  const int cuts = 2 / Wide, units = item.rows * cuts, step = item.parts * at_once;
  float4* const weights = shared.weights[warp];
  uint4(*const slots)[32] = shared.slots[warp];
  for (int base = item.rank * at_once; base < units; base += step) {
    const int unit = base + mine, row = unit / cuts, half = unit % cuts;
    const int q_row = item.first_row + row;
    float sum[Wide][8] = {};
    if (unit < units) {
      float high = -INFINITY, total = 0.0f;
      const Split split(call.plan, item.phase, call.plan.lanes(Phase(item.phase)), item.start,
                        item.parts, item.tile, row, q_row);
      Split own = split;
      if (item.joins) own = own_parts(call, item, q_row);
      const int parts = split.count + (item.joins ? own.count : 0);
      const auto place = [&](int part) {
        return part < split.count ? split.at(part) : own.at(part - split.count);
      };
      const auto fetch = [&](int first) {
        int slot = 0;
#pragma unroll 2
        for (int part = first; part < parts && slot < kSlots; part += groups, slot += Wide) {
          const uint4* from = call.part_out + place(part) * 64 + half * 32 + lane;
#pragma unroll
          for (int i = 0; i < Wide; ++i) copy_16(&slots[slot + i][lane], from + i * 32);
        }
      };
      // All lanes are done with the weights of the row before.
      __syncwarp();
#pragma unroll 1
      for (int part = lane; part < parts; part += 32)
        copy_16(&weights[part], reinterpret_cast<const float4*>(call.part_lse) + place(part));
      fetch(group);
      wait_for_copies();
      __syncwarp();
#pragma unroll 4
      for (int part = lane; part < parts; part += 32) high = fmaxf(high, weights[part].x);
      for (int i = 16; i; i /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, i));
      const float from = high == -INFINITY ? 0.0f : high;
#pragma unroll 1
      for (int part = lane; part < parts; part += 32) {
        float4 weight = weights[part];
        weight.x = exp2_fast(weight.x - from);
        total += weight.x;
        weight.y *= weight.x, weight.z *= weight.x;
        weights[part] = weight;
      }
      __syncwarp();
      for (int first = group; first < parts; first += kSome * groups) {
        if (first != group) {
          fetch(first);
          wait_for_copies();
        }
        int slot = 0;
#pragma unroll 2
        for (int part = first; part < parts && slot < kSlots; part += groups, slot += Wide) {
          const float4 weight = weights[part];
#pragma unroll
          for (int i = 0; i < Wide; ++i) {
            const float by = half + i ? weight.z : weight.y;
            const uint4 eight = slots[slot + i][lane];
            const __half2* pairs = reinterpret_cast<const __half2*>(&eight);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float2 two = __half22float2(pairs[k]);
              sum[i][k * 2] += by * two.x, sum[i][k * 2 + 1] += by * two.y;
            }
          }
        }
      }
      for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
      for (int k = 0; k < 8 * Wide; ++k) sum[k / 8][k % 8] *= inverse;
      if (group == 0 && half == 0 && lane == 0) call.lse[q_row] = log_of(high, total) * kLn2;
    }
    if (groups > 1) {
#pragma unroll
      for (int k = 0; k < 8; ++k) shared.sums[warp][k][lane] = sum[0][k];
      sync_group(1, kConsumers);
      if (group == 0)
        for (int other = 1; other < groups; ++other)
#pragma unroll
          for (int k = 0; k < 8; ++k) sum[0][k] += shared.sums[warp + other][k][lane];
      sync_group(1, kConsumers);
    }
    if (group == 0 && unit < units) {
      const int column = half * 256 + lane / Beside * Beside * 8 + lane % Beside * 2;
      __nv_bfloat16* to = call.out + int64_t(q_row) * kLatent + column;
#pragma unroll
      for (int k = 0; k < 4 * Wide; ++k)
        *reinterpret_cast<__nv_bfloat162*>(to + k / 4 * 256 + k % 4 * Beside * 2) =
            __floats2bfloat162_rn(sum[k / 4][k % 4 * 2], sum[k / 4][k % 4 * 2 + 1]);
    }
  }
}

// Until whoever has a part of the tile has brought it, in this launch.
__device__ void await(const unsigned* counter, unsigned launch, int count) {
  while (int(load_acquire(counter) - (launch + 1) * count) < 0) {
  }
}

// The keys that the members of a group do not share.
__device__ void await_members(const Call& call, const Item& item, unsigned launch) {
  const Plan& plan = call.plan;
  const int members = plan.members[item.row], last = item.first_row + item.rows;
  for (int i = threadIdx.x - 128; i < members; i += kConsumers) {
    const int row = item.row + i, from = __ldg(plan.query_start + row) * call.heads;
    const int to = __ldg(plan.query_start + row + 1) * call.heads;
    if (to <= item.first_row || from >= last || plan.blocks(kAlone, row) == 0) continue;
    const int count = plan.phase[kAlone].split_count[row];
    for (int tile = 0; from + tile * kRows < to; ++tile)
      await(plan.counter(kAlone, row, tile), launch, count);
  }
}

// How often the plan was used before. Every block of a tile comes by once a launch, so that the
// counts of those that came tell, as long as this block did not.
__device__ unsigned launches_before(const Call& call) {
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    if (item.into >= 0)
      return load_acquire(call.plan.counter(item.phase, item.row, item.tile)) / item.parts;
  }
  return 0;
}

// By the scores' warps, as soon as they have nothing else to do.
__device__ void note(const Call& call, Notes& notes, unsigned launch) {
  int count = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    if (walk.item.into < 0) continue;
    if (threadIdx.x == 128 && count < kNoted) notes.items[count] = walk.item;
    ++count;
  }
  if (threadIdx.x == 128) notes.count = count, notes.launch = launch;
}

// What was noted, one after the other, then what had no room.
template <typename Take>
__device__ void each_noted(const Call& call, const Notes& notes, const Take& take) {
  int next = -1;
#pragma unroll 1
  for (int i = 0; i < notes.count; ++i) {
    Item item;
    if (i < kNoted) {
      item = notes.items[i];
    } else {
      do {
        item = call.plan.item(next);
        next = item.next;
      } while (item.into < 0);
    }
    next = item.next;
    take(item);
  }
}

template <int Beside>
__device__ void merge(const Call& call, Merging& shared, const Notes& notes, uint64_t* noted) {
  arrive(noted);
  wait(noted, 0);
  if (notes.count == 0) return;
  const bool speaks = threadIdx.x == 128;
  if (speaks) {
    __threadfence();
    each_noted(call, notes, [&](const Item& item) {
      atomicAdd(call.plan.counter(item.phase, item.row, item.tile), 1u);
    });
  }
  __syncwarp();
  each_noted(call, notes, [&](const Item& item) {
    if (!item.merges()) return;
    if (speaks) await(call.plan.counter(item.phase, item.row, item.tile), notes.launch, item.parts);
    if (item.joins) await_members(call, item, notes.launch);
    sync_group(1, kConsumers);
    if (item.warps == 0)
      merge_tile<Beside, 2>(call, item, shared, 1, kWarps);
    else
      merge_tile<Beside, 1>(call, item, shared, item.warps % 16, item.warps / 16);
    sync_group(1, kConsumers);
  });
}

}  // namespace
