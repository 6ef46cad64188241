// Requests and the prefix cache: what is found at admission, what is published, what goes.
#include "control.hpp"

namespace tokenspeed {

using lifecycle::Action;

// Pages that could be found: the last known token is always computed, its logits are what is asked
// for.
std::size_t Control::matchable(const Record& record) const noexcept {
  const auto size = static_cast<std::size_t>(config_.page_size);
  return config_.prefix_cache ? (record.tokens.size() - 1) / size : 0;
}

PrefixIndex::Found Control::look(RequestIndex index) const {
  const Record& record = records_[index];
  return index_.look(record.salt, record.tokens, matchable(record));
}

const PrefixIndex::Found& Control::cached(RequestIndex index) {
  const Record& record = records_[index];
  const std::size_t most = matchable(record);
  const bool same = looked_.arrival == record.arrival && looked_.version == index_.version() &&
                    looked_.most == most;
  if (!same) looked_ = {record.arrival, index_.version(), most, look(index)};
  return looked_.found;
}

bool Control::deepen(PrefixIndex::Held& held, RequestIndex index) const {
  const Record& record = records_[index];
  return index_.deepen(held, record.salt, record.tokens, matchable(record));
}

// The longest cached prefix, held; and room for all pages that the request will ever have.
PageTable Control::match(RequestIndex index) {
  Record& record = records_[index];
  PageTable pages;
  pages.reserve(config_.groups.size() *
                static_cast<std::size_t>(pages_for(record.length_max - 1, config_.page_size)));
  if (!config_.prefix_cache) return pages;
  const PrefixIndex::Found found = cached(index);
  for (std::size_t group = 0; group < config_.groups.size(); ++group) {
    record.roots[group] = index_.enter(record.salt, group);
    record.cursors[group] = found.pages > 0 ? found.at[group] : record.roots[group];
    record.behind[group] = found.behind[group];
    record.slid += found.behind[group];
    if (gaps()) index_.stay(record.cursors[group]);
  }
  record.revisits = index_.hold(found, pages, record.session ? record.session->id : 0);
  if (record.session) sessions_.took(*record.session, record.supersedes);
  return pages;
}

// All pages before it are held, or passed, so its place in the index stays.
bool Control::publish(RequestIndex index) {
  Record& record = records_[index];
  if (!config_.prefix_cache || !computed(record, record.published)) return false;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(Action::Publish, S)) {
      const auto vacancy = next_vacancy(record);
      if (!vacancy) return false;
      const auto at = static_cast<std::size_t>(record.published);
      const auto tokens = tokens_of(record, record.published);
      handle<S>(index).pages().replace(at, [&](ExclusivePage&& page) {
        PrefixIndex::Cursor& cursor = record.cursors[group_of(record.published)];
        return index_.publish(cursor, tokens, *vacancy, std::move(page));
      });
      ++record.published;
      handle<S>(index) = lifecycle::Publish(*this, std::move(handle<S>(index)));
      const PageTable& pages = handle<S>(index).pages();
      note(pages.id(at), -1);
      if (recording_kv_) {
        kv_events_.push_back({name(Action::Publish),
                              pages.id(at),
                              at > 0 ? pages.id(at - 1) : -1,
                              at > 0 ? "" : record.salt,
                              {tokens.begin(), tokens.end()}});
      }
      return true;
    } else {
      return false;
    }
  });
}

bool Control::evict(PageId page) {
  if (!index_.evict(page, pool_)) return false;
  trace("Evict", page, -1);
  if (recording_kv_) kv_events_.push_back({"Evict", page});
  return true;
}

// A page becomes evictable when the last that hangs from it goes, so that leaves go first. Copies
// under way keep what they touch until they end, in vain.
Cleared Control::clear() {
  Cleared out;
  while (const auto page = index_.next_evictable()) {
    evict(*page);
    ++out.evicted;
  }
  host_.forsake();
  while (const auto block = host_.oldest()) host_drop(*block);
  out.held = std::ssize(index_.pages());
  if (recording_kv_ && out.held == 0) kv_events_.push_back({"Clear"});
  return out;
}

}  // namespace tokenspeed
