// Who takes which keys: one block of threads plans a step on the device, so that a graph may replay
// it. Rule: a plan is positions (row, block of 64 keys) along all rows, a share for each part of
// the grid, and what follows from them: for each block a list of items, which it takes in turn.
#pragma once

#include <stdint.h>

namespace {

constexpr int kRows = 64;  // of a tile: wgmma's M
constexpr int kKeys = 64;  // of a page
constexpr int kLatent = 512;
constexpr int kWidth = 576;
constexpr int kBlocksMax = 144;  // of the grid
constexpr int kPlanThreads = 1024;
constexpr int kWarps = 12;  // of a block that merge
constexpr int kFew = 12;    // parts that a warp sums by whole rows

// Rows beside each other whose page tables begin alike form a group: what all their queries see of
// the pages in common is taken once for all of them, first, and what each has beside that after.
enum Phase : int { kTogether, kAlone };

// What a block takes at a time: some keys of a row, or of a group, for one tile.
struct alignas(16) Item {
  int next;         // of the block, or -1
  int rows;         // of the tile that there are; 0 if the block has nothing to do
  int first, last;  // blocks of keys
  int pages[2];     // the first ones; -1 if there are none
  int first_row;    // of the tile, among all rows of q
  int tile, row;
  int length, count;  // keys and queries of the row
  int into;           // where the partial result begins, in rows; -1 if the result is whole
  int start, parts;   // the first part that begins inside the row, how many have keys of it
  int rank;           // of this part among those
  uint8_t phase, leads, joins;
  uint8_t warps;  // that share half a row when it is merged, + 16 x halves at once; 0: whole rows

  // Of a row of the tile: causal, bottom-right. What is common all queries see.
  __device__ int keys_seen(int mine, int heads) const {
    if (phase == kTogether) return length;
    const int seen = length - count + (tile * kRows + mine) / heads + 1;
    return seen < length ? seen : length;
  }

  // Members of a group leave it to the blocks that had its common keys.
  __device__ bool merges() const { return into >= 0 && (phase == kTogether || !joins); }
};
static_assert(sizeof(Item) == 64);

struct Plan {
  const int* query_start;  // [rows + 1]
  const int* kv_lens;      // [rows]
  const int* page_table;   // [rows, columns]
  struct {
    int* costs;         // [rows + 1], of the rows before
    int* part_row;      // [kBlocksMax + 1], where a part begins
    int* part_block;    // [kBlocksMax + 1]
    int* split_first;   // [rows], the first part that begins inside the row
    int* split_count;   // [rows], parts that have keys of the row
    unsigned* arrived;  // [rows * tiles]
  } phase[2];
  int* common;          // [rows], blocks of keys that a row leaves to its group
  int* members;         // [rows], of the group that begins with the row; 0 if none does
  int* lanes_together;  // [1], 0 if there are no groups
  int* items;           // [grid + 2 * (rows * tiles + grid)], the first ones of the blocks first
  int rows, columns, tiles;
  int grid;        // blocks
  int whole_rows;  // of q, at most, if groups are allowed; else 0

  __host__ __device__ Plan(const int* starts, const int* lens, const int* table, int* space,
                           int rows_, int columns_, int tiles_, int blocks, int whole_rows_)
      : query_start(starts),
        kv_lens(lens),
        page_table(table),
        rows(rows_),
        columns(columns_),
        tiles(tiles_),
        whole_rows(whole_rows_) {
    int* const begin = space;
    for (auto& one : phase) {
      one.costs = space;
      one.part_row = one.costs + rows + 1;
      one.part_block = one.part_row + kBlocksMax + 1;
      one.split_first = one.part_block + kBlocksMax + 1;
      one.split_count = one.split_first + rows;
      one.arrived = reinterpret_cast<unsigned*>(one.split_count + rows);
      space = one.split_count + rows + rows * tiles;
    }
    common = space;
    members = common + rows;
    lanes_together = members + rows;
    // Aligned, as the caller aligned `space`.
    items = begin + (lanes_together + 1 - begin + 15) / 16 * 16;
    grid = whole_rows > 0 ? blocks : lanes_alone(blocks) * (blocks / lanes_alone(blocks));
  }

  __host__ __device__ int lanes_alone(int blocks) const { return tiles < blocks ? tiles : blocks; }

  // Blocks beside each other that take the same keys, for other tiles.
  __device__ int lanes(Phase which) const {
    return which == kTogether ? *lanes_together : lanes_alone(grid);
  }

  __device__ int length(int row) const {
    const int length = __ldg(kv_lens + row);
    return length < 0 ? 0 : length < columns * kKeys ? length : columns * kKeys;
  }

  __device__ int blocks(int row) const { return (length(row) + kKeys - 1) / kKeys; }

  __device__ const Item& item(int at) const { return reinterpret_cast<const Item*>(items)[at]; }

  // Blocks that a row takes in a phase.
  __device__ int blocks(Phase which, int row) const {
    if (which == kAlone) return blocks(row) - common[row];
    return members[row] ? common[row] : 0;
  }

  // Of the parts that brought their results for a tile.
  __device__ unsigned* counter(int which, int row, int tile) const {
    return phase[which].arrived + row * tiles + tile;
  }

  // Where partial results begin that are not split: behind two tiles for each block and phase.
  __device__ int whole(Phase which) const { return (4 * grid * kRows) + which * whole_rows; }
};

// As many warps a half row as leave no block a second round.
__device__ inline uint8_t warps_of(int parts, int rows) {
  int groups = kWarps;
  while (groups > 1 && parts * (kWarps / groups) < rows * 2)
    groups = groups == 12 ? 6 : groups == 6 ? 4 : groups - 1;
  return uint8_t(groups + kWarps / groups * 16);
}

// The items of a block, one after the other, as the plan is made.
struct Walk {
  const Plan& plan;
  const int heads, block;
  Phase phase;
  int place, lanes, part, end_row, end_block;  // of the phase
  int tile, row;
  Item item;
  bool begun;

  __device__ Walk(const Plan& plan_, int heads_, int block_)
      : plan(plan_), heads(heads_), block(block_) {
    enter(plan.lanes(kTogether) ? kTogether : kAlone);
  }

  // The last blocks of the grid may have nothing to do together, and are the first alone.
  __device__ void enter(Phase which) {
    phase = which;
    lanes = plan.lanes(phase);
    place = phase == kTogether ? block : plan.grid - 1 - block;
    part = place / lanes;
    tile = place % lanes;
    begun = false;
    const bool idle = part >= plan.grid / lanes;
    end_row = idle ? -1 : plan.phase[phase].part_row[part + 1];
    end_block = idle ? 0 : plan.phase[phase].part_block[part + 1];
  }

  __device__ bool next() {
    for (;;) {
      int skipped = 0;
      if (begun) {
        ++row;
      } else {
        begun = true;
        row = end_row < 0 ? plan.rows : plan.phase[phase].part_row[part];
        skipped = end_row < 0 ? 0 : plan.phase[phase].part_block[part];
      }
      if (row >= plan.rows || row > end_row || (row == end_row && end_block == 0)) {
        begun = false;
        tile += lanes;
        if (tile < (phase == kTogether ? lanes : plan.tiles)) continue;
        if (phase == kAlone) return false;
        enter(kAlone);
        continue;
      }
      if (take(skipped)) return true;
    }
  }

  // False if there is nothing to do for the row.
  __device__ bool take(int skipped) {
    const int shared = plan.common[row], start = __ldg(plan.query_start + row);
    const int of_rows = phase == kTogether ? plan.members[row] : 1;
    const int length = phase == kTogether ? shared * kKeys : plan.length(row);
    const int count = __ldg(plan.query_start + row + of_rows) - start;
    const int rows = count * heads - tile * kRows;
    const int from = phase == kTogether ? 0 : shared, to = (length + kKeys - 1) / kKeys;
    if (rows <= 0 || (shared > 0 && from == to)) return false;
    const auto& planned = plan.phase[phase];
    item = Item{.next = -1, .rows = rows < kRows ? rows : kRows};
    item.first = from + skipped;
    item.last = row == end_row && from + end_block < to ? from + end_block : to;
    item.first_row = start * heads + tile * kRows;
    item.tile = tile, item.row = row, item.length = length, item.count = count;
    item.phase = phase, item.leads = skipped == 0, item.joins = shared > 0;
    item.start = planned.split_first[row], item.parts = planned.split_count[row];
    item.rank = item.leads ? 0 : part - item.start + 1;
    if (item.parts > 1)
      item.into = (2 * (phase * plan.grid + place) + item.leads) * kRows;
    else
      item.into = item.joins ? plan.whole(phase) + item.first_row : -1;
    item.warps = item.parts <= kFew ? 0 : warps_of(item.parts, item.rows);
    const int* table = plan.page_table + int64_t(row) * plan.columns;
    for (int i = 0; i < 2; ++i) {
      const int at = item.first + i, page = at < item.last ? __ldg(table + at) : -1;
      item.pages[i] = at < item.last && page < 0 ? INT32_MAX : page;  // either does not exist
    }
    return true;
  }
};

// The same as they were planned. All warps of a block walk the same way.
struct Items {
  const Item* items;
  int at;
  Item item;

  __device__ Items(const Plan& plan, int block) : items(&plan.item(0)), at(block) {}

  __device__ bool next() {
    if (at < 0) return false;
    item = items[at];
    at = item.next;
    return item.rows > 0;
  }
};

// Parts that share a tile, in the order of their keys.
struct Split {
  int first, step;  // where the partial results of parts 1, 2, ... are, in rows
  int before;       // where that of part 0 is
  int count;

  // For a row of the tile that is `q_row` among all.
  __device__ Split(const Plan& plan, int phase, int lanes, int start, int count_, int tile,
                   int mine, int q_row)
      : step(2 * lanes * kRows), count(count_) {
    first = 2 * (phase * plan.grid + start * lanes + tile) * kRows + mine;
    before = count == 1 ? plan.whole(Phase(phase)) + q_row : first - step + kRows;
  }

  __device__ int at(int part) const { return part ? first + (part - 1) * step : before; }
};

// --- Groups
// ---------------------------------------------------------------------------------------

// Blocks of a row that all of its queries see whole.
__device__ int seen_by_all(const Plan& plan, int heads, int row) {
  const int count = __ldg(plan.query_start + row + 1) - __ldg(plan.query_start + row);
  const int seen = plan.length(row) - count + 1;
  const bool fits = count > 0 && count * heads <= plan.tiles * kRows;
  return fits && seen > 0 ? seen / kKeys : 0;
}

struct Found {
  int like_last[kPlanThreads];   // blocks that a row has in common with the one before it
  int starts[kPlanThreads + 1];  // query_start
  int lanes;
};

// Rows join one after the other, as long as that saves blocks; by one thread. Returns the lanes of
// the largest group, or 0 if tiles that hold several rows take no fewer blocks than others.
__device__ int group_rows(const Plan& plan, const Found& found, int heads, int rows,
                          int saved_min) {
  int first = 0, common = 0, lanes = 0, together = 0, alone = 0;
  const auto tiles = [&](int from, int to) {
    return ((found.starts[to] - found.starts[from]) * heads + kRows - 1) / kRows;
  };
  const auto close = [&](int end) {
    const int members = end - first;
    if (members < 2 || common * (members - 1) < saved_min) return;
    plan.members[first] = members;
    for (int row = first; row < end; ++row) {
      plan.common[row] = common;
      alone += common * tiles(row, row + 1);
    }
    together += common;
    lanes = max(lanes, tiles(first, end));
  };
  for (int row = 1; row < rows; ++row) {
    const int like = found.like_last[row], members = row - first;
    const int joined = members == 1 ? like : min(common, like);
    const auto fits = [&](int from) { return tiles(from, row + 1) <= plan.grid / 2; };
    const bool saves = joined > 0 && joined * members >= common * (members - 1);
    if (members > 1 && like > 2 * common &&
        fits(row - 1)) {  // the row before it is better off with this one
      close(row - 1);
      first = row - 1;
      common = like;
    } else if (fits(first) && saves) {
      common = joined;
    } else {
      close(row);
      first = row;
      common = 0;
    }
  }
  close(rows);
  // Less than an eighth saved is lost by merging.
  return 8 * int64_t(together) * lanes <= 7 * int64_t(alone) ? lanes : 0;
}

// Fills common, members and lanes_together; returns the lanes that groups have, 0 without any.
__device__ int find_groups(const Plan& plan, int heads, int saved_min) {
  __shared__ Found found;
  const int thread = threadIdx.x, lane = thread % 32;
  for (int row = thread; row < plan.rows; row += kPlanThreads)
    plan.common[row] = plan.members[row] = 0;
  if (thread == 0) *plan.lanes_together = 0;
  const int rows = min(plan.rows, kPlanThreads);
  bool any = false;
  for (int row = 1 + thread / 32; row < rows && plan.whole_rows; row += kPlanThreads / 32) {
    const int most = min(seen_by_all(plan, heads, row - 1), seen_by_all(plan, heads, row));
    const int* mine = plan.page_table + int64_t(row) * plan.columns;
    int like = 0;
    while (like < most) {
      const int at = like + lane;
      const bool differs = at >= most || __ldg(mine + at) != __ldg(mine + at - plan.columns);
      const unsigned where = __ballot_sync(~0u, differs);
      like += where ? __ffs(where) - 1 : 32;
      if (where) break;
    }
    if (lane == 0) found.like_last[row] = like;
    any |= like > 0;
  }
  for (int row = thread; row <= rows; row += kPlanThreads)
    found.starts[row] = __ldg(plan.query_start + row);
  if (!__syncthreads_or(any)) return 0;
  const bool fits = int64_t(__ldg(plan.query_start + plan.rows)) * heads <= plan.whole_rows;
  if (thread == 0) found.lanes = fits ? group_rows(plan, found, heads, rows, saved_min) : 0;
  __syncthreads();
  if (thread == 0) *plan.lanes_together = found.lanes;
  for (int row = thread; row < plan.rows && found.lanes == 0; row += kPlanThreads)
    plan.common[row] = plan.members[row] = 0;
  __syncthreads();
  return found.lanes;
}

// --- Shares
// ---------------------------------------------------------------------------------------

// Cuts what a phase has to do into shares.
__device__ void cut(const Plan& plan, Phase which, int lanes, int overhead, int cost_min) {
  __shared__ int sums[32];
  __shared__ int before;
  const auto& to = plan.phase[which];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, parts = plan.grid / lanes;
  if (thread == 0) before = to.costs[0] = 0;
  __syncthreads();
  for (int base = 0; base < plan.rows; base += kPlanThreads) {
    const int row = base + thread;
    int sum = row < plan.rows ? plan.blocks(which, row) : 0;
    const bool any = sum > 0 || (row < plan.rows && which == kAlone && plan.common[row] == 0);
    if (any) sum += overhead;
    for (int i = 1; i < 32; i *= 2) {
      const int left = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += left;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int earlier = before;
    for (int i = 0; i < warp; ++i) earlier += sums[i];
    if (row < plan.rows) to.costs[row + 1] = earlier + sum;
    __syncthreads();
    if (thread == kPlanThreads - 1) before = earlier + sum;
    __syncthreads();
  }
  const int total = before;
  for (int row = thread; row < plan.rows; row += kPlanThreads) {
    to.split_count[row] = 1;
    to.split_first[row] = 0;
  }
  for (int i = thread; i < plan.rows * plan.tiles; i += kPlanThreads) to.arrived[i] = 0;
  // A part of less than cost_min costs more to merge than it saves.
  const int useful = total / cost_min;
  const int used = useful < 1 ? 1 : useful < parts ? useful : parts;
  if (thread <= parts) {
    const int at = thread < used ? int(int64_t(thread) * total / used) : total;
    int low = 0, high = plan.rows;
    while (low < high) {  // the last row whose costs[row] <= at
      const int middle = (low + high + 1) / 2;
      if (to.costs[middle] <= at)
        low = middle;
      else
        high = middle - 1;
    }
    const int inside = low < plan.rows ? at - to.costs[low] - overhead : 0;
    to.part_row[thread] = low;
    to.part_block[thread] = inside > 0 ? inside : 0;
  }
  __syncthreads();
  const bool splits = thread < parts && to.part_block[thread] > 0;
  const int row = splits ? to.part_row[thread] : -1;
  const auto splits_too = [&](int part) {
    return to.part_block[part] > 0 && to.part_row[part] == row;
  };
  if (splits && !splits_too(thread - 1)) to.split_first[row] = thread;
  __syncthreads();
  if (splits && !splits_too(thread + 1)) to.split_count[row] = thread - to.split_first[row] + 2;
  __syncthreads();
}

// Whether the rows have queries of their own, all of them among so many tokens.
__device__ bool in_bounds(const Plan& plan, int tokens) {
  bool strange = false;
  for (int row = threadIdx.x; row < plan.rows; row += kPlanThreads) {
    const int start = __ldg(plan.query_start + row), end = __ldg(plan.query_start + row + 1);
    strange |= start < 0 || end < start || end > tokens;
  }
  return !__syncthreads_or(strange);
}

__global__ void __launch_bounds__(kPlanThreads)
    make_plan(const __grid_constant__ Plan plan, int tokens, int heads, int overhead, int cost_min,
              int saved_min) {
  const int thread = threadIdx.x;
  // Queries that are not there would be written: then nobody has anything to do.
  if (!in_bounds(plan, tokens)) {
    if (thread < plan.grid) reinterpret_cast<Item*>(plan.items)[thread] = Item{.next = -1};
    return;
  }
  const int lanes = find_groups(plan, heads, saved_min);
  if (lanes) cut(plan, kTogether, lanes, overhead, cost_min);
  cut(plan, kAlone, plan.lanes_alone(plan.grid), overhead, cost_min);
  __shared__ int items;
  if (thread == 0) items = plan.grid;
  __syncthreads();
  if (thread >= plan.grid) return;
  Item* const to = reinterpret_cast<Item*>(plan.items);
  Item last{.next = -1};
  int at = thread;
  for (Walk walk(plan, heads, thread); walk.next(); last = walk.item) {
    if (last.rows == 0) continue;
    last.next = atomicAdd(&items, 1);
    to[at] = last;
    at = last.next;
  }
  to[at] = last;
}

}  // namespace
