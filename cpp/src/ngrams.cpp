#include "ngrams.hpp"

#include <algorithm>
#include <bit>
#include <utility>

namespace tokenspeed {

namespace {

constexpr std::size_t at(std::int32_t place) noexcept {
  return static_cast<std::size_t>(place);
}

std::span<const Token> run(std::span<const Token> text, std::int32_t end) noexcept {
  return text.subspan(at(end - Ngrams::kGram), at(Ngrams::kGram));
}

// Tokens before two places that are alike, up to kMatchMax.
std::int32_t match(std::span<const Token> text, std::int32_t place) noexcept {
  const auto end = static_cast<std::int32_t>(text.size());
  const std::int32_t most = std::min(place, Ngrams::kMatchMax);
  std::int32_t same = Ngrams::kGram;
  while (same < most && text[at(place - 1 - same)] == text[at(end - 1 - same)]) ++same;
  return same;
}

}  // namespace

// Where the run that ends at a place is, or would be.
std::size_t Ngrams::slot(std::span<const Token> text, std::int32_t end) const noexcept {
  const auto wanted = run(text, end);
  std::uint64_t hash = 0;
  for (const Token token : wanted) {
    hash = (std::rotl(hash, 23) ^ static_cast<std::uint32_t>(token)) * 0x9E3779B97F4A7C15ULL;
  }
  std::size_t slot = (hash ^ (hash >> 32)) & (last_.size() - 1);
  while (last_[slot] >= 0 && !std::ranges::equal(run(text, last_[slot]), wanted)) {
    slot = (slot + 1) & (last_.size() - 1);
  }
  return slot;
}

void Ngrams::grow(std::span<const Token> text) {
  const std::size_t size = std::bit_ceil(2 * std::max(text.size(), 2 * runs_ + 1));
  const std::vector<std::int32_t> old = std::exchange(last_, std::vector<std::int32_t>(size, -1));
  for (const std::int32_t place : old) {
    if (place >= 0) last_[slot(text, place)] = place;
  }
}

// A run is entered when something follows it.
void Ngrams::extend(std::span<const Token> text) {
  before_.reserve(text.size());
  for (std::size_t end = before_.size(); end < text.size(); ++end) {
    before_.push_back(-1);
    if (end < at(kGram)) continue;
    if (2 * runs_ >= last_.size()) grow(text);
    std::int32_t& last = last_[slot(text, static_cast<std::int32_t>(end))];
    if (last < 0) ++runs_;
    before_.back() = std::exchange(last, static_cast<std::int32_t>(end));
  }
}

void Ngrams::guess(std::span<const Token> text, std::size_t most, std::vector<Token>& out) const {
  if (last_.empty()) return;
  std::int32_t place = last_[slot(text, static_cast<std::int32_t>(text.size()))];
  std::int32_t best = -1;
  std::int32_t longest = 0;
  for (int places = 0; place >= 0 && places < kPlacesMax; ++places, place = before_[at(place)]) {
    if (const std::int32_t length = match(text, place); length > longest) {
      best = place;
      longest = length;
    }
  }
  if (best < 0) return;
  const std::size_t first = out.size();
  for (std::size_t next = at(best); out.size() - first < most; ++next) {
    out.push_back(next < text.size() ? text[next] : out[first + next - text.size()]);
  }
}

}  // namespace tokenspeed
