// What windows change: specs/Window.tla, and specs/features/Groups.tla where only some layers have
// one. Rule: a page goes as soon as nothing to come, and no step in flight, sees any of it; a hole
// stays in its place.
#include <algorithm>
#include <limits>
#include <variant>

#include "control.hpp"

namespace tokenspeed {

namespace {
constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
}

std::int32_t Control::pages_needed(std::int32_t tokens) const noexcept {
  return pages_seen(tokens, 0);
}

// That as many tokens in a row may lie in.
std::int32_t Control::pages_within(std::int32_t tokens) const noexcept {
  return tokens == 1 ? 1 : (tokens - 2) / config_.page_size + 2;
}

// In each group a window, and what is planned beyond what is computed; where the pool is smaller,
// less is planned.
std::int32_t Control::pages_at_once(std::int32_t tokens) const noexcept {
  return std::min(pages_seen(tokens, std::int64_t{config_.chunk} * config_.in_flight_max),
                  config_.pages);
}

// Of so many tokens, what lies in a window and so many tokens beyond it, in all groups.
std::int32_t Control::pages_seen(std::int32_t tokens, std::int64_t beyond) const noexcept {
  const std::int32_t whole = pages_for(tokens, config_.page_size);
  std::int64_t out = 0;
  for (const CacheGroup& group : config_.groups) {
    const std::int64_t span = group.window + beyond;
    const bool all = group.window == 0 || span >= tokens;
    out += all ? whole : std::min(whole, pages_within(static_cast<std::int32_t>(span)));
  }
  return static_cast<std::int32_t>(std::min(out, kMost));
}

// Steps complete in order, so no query to come is before `done`: what that one does not see, nobody
// will. A page that was never published leaves the place below it in the index to go on from.
bool Control::slide(RequestIndex index) {
  if (!slides_) return false;
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(lifecycle::Action::Schedule, S)) {
      Record& record = records_[index];
      const auto group = next_to_slide(record);
      if (!group) return false;
      const std::int32_t at =
          record.behind[*group]++ * groups() + static_cast<std::int32_t>(*group);
      ++record.slid;
      PageTable& pages = handle<S>(index).pages();
      if (recording_) trace_.push_back({"Slide", record.number, pages.id(index_of(at)), -1, {}});
      auto entry = pages.leave_hole(index_of(at));
      if (auto* own = std::get_if<ExclusivePage>(&entry)) pool_.give_back(std::move(*own));
      if (auto* shared = std::get_if<SharedPage>(&entry)) index_.release(std::move(*shared), -1);
      while (record.published <= at) pass(record);
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

std::optional<std::size_t> Control::next_to_slide(const Record& record) const noexcept {
  for (std::size_t group = 0; group < config_.groups.size(); ++group) {
    const std::int32_t behind = index_.pages_behind(group, record.done);
    if (record.behind[group] < std::min(record.pages / groups(), behind)) return group;
  }
  return std::nullopt;
}

void Control::pass(Record& record) {
  PrefixIndex::Cursor& cursor = record.cursors[group_of(record.published)];
  if (config_.prefix_cache) cursor = index_.pass(cursor, tokens_of(record, record.published));
  ++record.published;
}

// For the first page that is not published, if it is full, computed, its tokens are known, and
// nobody has published the same. Among several groups one that somebody has published is passed: of
// another group its like may be gone.
std::optional<PrefixIndex::Vacancy> Control::next_vacancy(Record& record) {
  while (computed(record, record.published)) {
    const auto at = record.cursors[group_of(record.published)];
    auto vacancy = index_.vacancy(at, tokens_of(record, record.published));
    if (vacancy || groups() == 1) return vacancy;
    pass(record);
  }
  return std::nullopt;
}

void Control::watch(RequestIndex index) {
  const Record& record = records_[index];
  index_.watch(record.salt, record.tokens, matchable(record));
}

void Control::count_pages(Record& record, std::int32_t pages) noexcept {
  record.pages = pages;
  record.told = std::min(record.told, pages);
  record.holds = page_of(pages) * config_.page_size;
}

// Of an entry of its table.
std::span<const Token> Control::tokens_of(const Record& record, std::int32_t entry) const noexcept {
  const auto size = static_cast<std::size_t>(config_.page_size);
  return std::span(record.tokens).subspan(static_cast<std::size_t>(page_of(entry)) * size, size);
}

}  // namespace tokenspeed
