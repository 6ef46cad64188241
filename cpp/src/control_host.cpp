// The actions of specs/HostTier.tla: `HostTier` moves pages, here are the guards that look at
// requests, and what is told of each.
#include "control.hpp"

namespace tokenspeed {

bool Control::store_start(PageId page, HostPage block) {
  if (Starved() || !host_.store_start(page, block)) return false;
  trace("StoreStart", page, block);
  return true;
}

bool Control::store_end(HostPage block, bool good) {
  const PageId page = block >= 0 && block < host_.total() ? host_[block].copied : -1;
  if (!host_.store_end(block, good)) return false;
  trace("StoreEnd", page, block, good ? "good" : "bad");
  return true;
}

// Only with pages to spare: a page that a running request lacks is not taken from it.
bool Control::load_start(HostPage block, PageId page) {
  if (!NoneLacks() || !host_.load_start(block, page)) return false;
  trace("LoadStart", page, block);
  return true;
}

bool Control::load_end(HostPage block, bool good) {
  const PageId page = block >= 0 && block < host_.total() ? host_[block].copied : -1;
  if (!host_.load_end(block, good)) return false;
  trace("LoadEnd", page, block, good ? "good" : "bad");
  const NodeId node = host_[block].node;
  if (recording_kv_ && index_.node(page) == node) {
    const std::vector<Token> key = index_.key(node);
    const NodeId above = index_.parent(node);
    const bool first = index_.is_root(above);
    kv_events_.push_back({"Publish",
                          page,
                          first ? -1 : index_.page(above),
                          first ? std::string(index_.salt(node)) : std::string(),
                          {key.end() - config_.page_size, key.end()}});
  }
  return true;
}

bool Control::host_drop(HostPage block) {
  if (!host_.drop(block)) return false;
  trace("HostDrop", -1, block);
  return true;
}

void Control::look_further(RequestIndex index, std::vector<HostPage>& out) {
  const Record& record = records_[index];
  const PrefixIndex::Found found = cached(index);
  out.clear();
  index_.beyond(found, record.tokens, matchable(record), record.salt, out);
}

}  // namespace tokenspeed
