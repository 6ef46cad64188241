// Drafts without a model: what followed the last time that a text ended as it does now. Rule: a
// drafter only guesses. Whatever it says, the output is the one of no drafts; a wrong guess costs a
// row's positions, a right one saves a step.
//
// Text is looked up in the request's own context (prompt lookup: Saxena, 2023; Yang et al.,
// "Inference with reference", 2023). The text is its owner's: here are places in it alone.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "prefix_index.hpp"

namespace tokenspeed {

class Ngrams final {
 public:
  static constexpr std::int32_t kGram = 3;  // tokens that must match before anything is guessed
  static constexpr int kPlacesMax = 4;      // latest places that are compared with the end
  static constexpr std::int32_t kMatchMax = 32;  // up to which a longer match is a better one

  // Enters what has come to a text since the last call: O(new tokens).
  void extend(std::span<const Token> text);
  // What may come next, at most so many tokens, appended; nothing if the end of the text is new.
  // Of several places the one with the longest match, and of these the latest. Of a period, the
  // guesses go on themselves.
  void guess(std::span<const Token> text, std::size_t most, std::vector<Token>& out) const;

 private:
  std::size_t slot(std::span<const Token> text, std::int32_t end) const noexcept;
  void grow(std::span<const Token> text);

  // By the run of kGram tokens that ends there: the last place (the index after it); -1: none. Less
  // than half full.
  std::vector<std::int32_t> last_;
  std::vector<std::int32_t> before_;  // of each place, the one before it with the same run; or -1
  std::size_t runs_ = 0;
};

}  // namespace tokenspeed
