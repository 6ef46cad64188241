// The C ABI of a kernel: 0, or a cudaError_t. Included last, behind `using Kind = ...`.

extern "C" int mla_decode_sm90_blocks(void) {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count < kBlocksMax ? count : kBlocksMax;
}

extern "C" int mla_decode_sm90_plan(const int* query_start, const int* kv_lens,
                                    const int* page_table, int* space, int rows, int columns,
                                    int tokens, int heads, int tiles, int blocks, int whole_rows,
                                    int overhead, int cost_min, int saved_min, void* stream) {
  const Plan plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks,
                  whole_rows);
  make_plan<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      plan, tokens, heads, overhead, cost_min, saved_min);
  return int(cudaGetLastError());
}

extern "C" int mla_decode_sm90(const void* q, const void* pages, const int* query_start,
                               const int* kv_lens, const int* page_table, int* space, void* out,
                               float* lse, void* part_out, float* part_lse, int64_t q_stride,
                               int64_t page_stride, int64_t key_stride, int tokens, int pages_count,
                               int rows, int columns, int heads, int tiles, int blocks,
                               int whole_rows, float scale, int only_load, void* stream) {
  const Call call{
      Plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks, whole_rows),
      static_cast<__nv_bfloat16*>(out),
      lse,
      static_cast<uint4*>(part_out),
      part_lse,
      heads,
      scale * 1.4426950408889634f};
  const Given given{q, pages, q_stride, page_stride, key_stride, tokens, pages_count, heads};
  return launch<Kind>(call, given, only_load, static_cast<cudaStream_t>(stream));
}
