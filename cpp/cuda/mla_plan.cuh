// Who takes which keys: one block of threads plans a step on the device, so that a graph may replay
// it. Rule: a plan is positions (row, block of 64 keys) along all rows, a share for each part of
// the grid; what a row's split looks like follows from them alone, so every block computes the
// same.
#pragma once

#include <stdint.h>

namespace {

constexpr int kRows = 64;  // of a tile: wgmma's M
constexpr int kKeys = 64;  // of a page
constexpr int kLatent = 512;
constexpr int kWidth = 576;
constexpr int kBlocksMax = 144;  // of the grid
constexpr int kPlanThreads = 1024;

struct Plan {
  const int* query_start;  // [rows + 1]
  const int* kv_lens;      // [rows]
  const int* page_table;   // [rows, columns]
  int* costs;              // [rows + 1], of the rows before
  int* part_row;           // [kBlocksMax + 1], where a part begins
  int* part_block;         // [kBlocksMax + 1]
  int* split_first;        // [rows], the first part that begins inside the row
  int* split_count;        // [rows], parts that have keys of the row
  int* early;              // [kBlocksMax, 3], what a block loads first: two pages or -1, a row of q
  unsigned* arrived;       // [rows * tiles]
  int rows, columns, tiles;
  int lanes;  // blocks beside each other that take the same keys, for other tiles
  int parts;

  __host__ __device__ Plan(const int* starts, const int* lens, const int* table, int* space,
                           int rows_, int columns_, int tiles_, int blocks)
      : query_start(starts),
        kv_lens(lens),
        page_table(table),
        costs(space),
        part_row(costs + rows_ + 1),
        part_block(part_row + kBlocksMax + 1),
        split_first(part_block + kBlocksMax + 1),
        split_count(split_first + rows_),
        early(split_count + rows_),
        arrived(reinterpret_cast<unsigned*>(early + 3 * kBlocksMax)),
        rows(rows_),
        columns(columns_),
        tiles(tiles_),
        lanes(tiles_ < blocks ? tiles_ : blocks),
        parts(blocks / lanes) {}

  __host__ __device__ int blocks_used() const { return lanes * parts; }

  __device__ int length(int row) const {
    const int length = __ldg(kv_lens + row);
    return length < 0 ? 0 : length < columns * kKeys ? length : columns * kKeys;
  }

  __device__ int blocks(int row) const { return (length(row) + kKeys - 1) / kKeys; }
};

// The tiles that a block of the grid takes, one after the other, with their keys. All of its warps
// walk the same way.
struct Walk {
  const Plan& plan;
  const int heads, block, lane, part, end_row, end_block;
  int tile, row;
  int first, last;    // blocks of keys
  int length, count;  // keys and queries of the row
  int first_row;      // of the tile, among all rows of q
  int rows;           // of the tile that there are
  int slot;           // of the partial result; -1 if the row's keys are not split
  bool begun = false;

  __device__ Walk(const Plan& plan_, int heads_, int block_)
      : plan(plan_),
        heads(heads_),
        block(block_),
        lane(block % plan.lanes),
        part(block / plan.lanes),
        end_row(plan.part_row[part + 1]),
        end_block(plan.part_block[part + 1]),
        tile(lane) {}

  __device__ bool next() {
    for (;;) {
      if (begun) {
        ++row;
        first = 0;
      } else {
        begun = true;
        row = plan.part_row[part];
        first = plan.part_block[part];
      }
      if (row >= plan.rows || row > end_row || (row == end_row && end_block == 0)) {
        tile += plan.lanes;
        if (tile >= plan.tiles) return false;
        begun = false;
        continue;
      }
      const int start = __ldg(plan.query_start + row);
      count = __ldg(plan.query_start + row + 1) - start;
      rows = count * heads - tile * kRows;
      if (rows <= 0) continue;
      if (rows > kRows) rows = kRows;
      first_row = start * heads + tile * kRows;
      length = plan.length(row);
      const int blocks = (length + kKeys - 1) / kKeys;
      last = row == end_row && end_block < blocks ? end_block : blocks;
      slot = first == 0 && last == blocks ? -1 : 2 * block + (first == 0);
      return true;
    }
  }

  // Of a row of the tile: causal, bottom-right.
  __device__ int keys_seen(int mine) const {
    const int seen = length - count + (tile * kRows + mine) / heads + 1;
    return seen < length ? seen : length;
  }

  __device__ int counter() const { return row * plan.tiles + tile; }
};

// The parts that share a tile, in the order of their keys.
struct Split {
  const Plan& plan;
  const int tile, start, count, rank;

  __device__ Split(const Plan& plan_, const Walk& walk)
      : plan(plan_),
        tile(walk.tile),
        start(plan.split_first[walk.row]),
        count(plan.split_count[walk.row]),
        rank(walk.first == 0 ? 0 : walk.part - start + 1) {}

  __device__ int slot(int part) const {
    return 2 * ((start - 1 + part) * plan.lanes + tile) + (part == 0);
  }
};

__global__ void __launch_bounds__(kPlanThreads)
    make_plan(Plan plan, int heads, int overhead, int cost_min) {
  __shared__ int sums[32];
  __shared__ int before;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  if (thread == 0) before = plan.costs[0] = 0;
  __syncthreads();
  for (int base = 0; base < plan.rows; base += kPlanThreads) {
    const int row = base + thread;
    int sum = row < plan.rows ? plan.blocks(row) + overhead : 0;
    for (int i = 1; i < 32; i *= 2) {
      const int left = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += left;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int earlier = before;
    for (int i = 0; i < warp; ++i) earlier += sums[i];
    if (row < plan.rows) plan.costs[row + 1] = earlier + sum;
    __syncthreads();
    if (thread == kPlanThreads - 1) before = earlier + sum;
    __syncthreads();
  }
  const int total = before;
  for (int row = thread; row < plan.rows; row += kPlanThreads) {
    plan.split_count[row] = 1;
    plan.split_first[row] = 0;
  }
  for (int i = thread; i < plan.rows * plan.tiles; i += kPlanThreads) plan.arrived[i] = 0;
  // A part of less than cost_min costs more to merge than it saves.
  const int useful = total / cost_min;
  const int used = useful < 1 ? 1 : useful < plan.parts ? useful : plan.parts;
  if (thread <= plan.parts) {
    const int at = thread < used ? int(int64_t(thread) * total / used) : total;
    int low = 0, high = plan.rows;
    while (low < high) {  // the last row whose costs[row] <= at
      const int middle = (low + high + 1) / 2;
      if (plan.costs[middle] <= at)
        low = middle;
      else
        high = middle - 1;
    }
    const int inside = low < plan.rows ? at - plan.costs[low] - overhead : 0;
    plan.part_row[thread] = low;
    plan.part_block[thread] = inside > 0 ? inside : 0;
  }
  __syncthreads();
  const bool splits = thread < plan.parts && plan.part_block[thread] > 0;
  const int row = splits ? plan.part_row[thread] : -1;
  const auto splits_too = [&](int part) {
    return plan.part_block[part] > 0 && plan.part_row[part] == row;
  };
  if (splits && !splits_too(thread - 1)) plan.split_first[row] = thread;
  __syncthreads();
  if (splits && !splits_too(thread + 1)) plan.split_count[row] = thread - plan.split_first[row] + 2;
  __syncthreads();
  if (thread < plan.blocks_used()) {
    int* early = plan.early + 3 * thread;
    early[0] = early[1] = -1;
    for (Walk walk(plan, heads, thread); walk.next();) {
      const int* table = plan.page_table + int64_t(walk.row) * plan.columns;
      for (int i = 0; i < 2 && walk.first + i < walk.last; ++i) {
        const int page = table[walk.first + i];
        early[i] = page < 0 ? INT32_MAX : page;  // either does not exist
      }
      early[2] = walk.first_row;
      if (walk.first < walk.last) break;
    }
  }
}

}  // namespace
