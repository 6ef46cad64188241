// What is remembered of a prefix is never less than what is held of it. Rule: after each change,
// the index brings an old answer up to date, and a fresh look must agree.
#include "prefix_index.hpp"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>

namespace {

using namespace tokenspeed;

constexpr std::int32_t kPages = 7;  // so few that a node is evicted and used again all the time
constexpr std::size_t kLength = 4;
using Prompt = std::array<Token, kLength>;

[[noreturn]] void fail(const char* what, unsigned seed) {
  std::fprintf(stderr, "%s (seed %u)\n", what, seed);
  std::abort();
}

// Somebody who holds a prefix, in pages of one token.
struct Holder {
  PageTable table;
  PrefixIndex::Cursor root = -1;
  PrefixIndex::Cursor cursor = -1;
  std::size_t pages = 0;
};

class World {
 public:
  explicit World(unsigned seed) : random_(seed), pool_(kPages), index_(1, kPages, 0, 0) {}
  ~World() {
    while (!holders_.empty()) leave();
  }

  // Takes what is cached of a prompt, and publishes as much of the rest as there are pages for.
  void come(const Prompt& prompt) {
    Holder holder;
    const auto found = index_.look("", prompt, kLength);
    holder.root = index_.enter("");
    holder.cursor = found.pages > 0 ? found.at[0] : holder.root;
    holder.pages = static_cast<std::size_t>(found.pages);
    index_.hold(found, holder.table, 0);
    const std::size_t most = 1 + upto(kLength);
    for (; holder.pages < most && page_is_free(); ++holder.pages) {
      const auto content = std::span(prompt).subspan(holder.pages, 1);
      const auto vacancy = index_.vacancy(holder.cursor, content);
      auto page = pool_.take(*pool_.next());
      holder.table.append(
          index_.publish(holder.cursor, content, vacancy.value(), std::move(page).value()));
    }
    holders_.push_back(std::move(holder));
  }

  void leave() {
    if (holders_.empty()) return;
    std::swap(holders_[upto(holders_.size())], holders_.back());
    Holder& holder = holders_.back();
    const TailId tail = index_.open_tail(0, false);
    while (!holder.table.empty()) {
      index_.release(std::get<SharedPage>(holder.table.pop()), tail);
    }
    index_.close_tail(tail);
    index_.leave(holder.root);
    holders_.pop_back();
  }

  Prompt draw() {
    Prompt prompt;
    for (Token& token : prompt) token = static_cast<Token>(upto(2));
    return prompt;
  }
  std::size_t upto(std::size_t n) { return random_() % n; }
  const PrefixIndex& index() const noexcept { return index_; }

 private:
  bool page_is_free() {
    if (pool_.free() > 0) return true;
    const auto next = index_.next_evictable();
    return next && index_.evict(*next, pool_);
  }

  std::mt19937 random_;
  PagePool pool_;
  PrefixIndex index_;
  std::vector<Holder> holders_;
};

void run(unsigned seed) {
  World world(seed);
  const Prompt prompt = world.draw();
  PrefixIndex::Held held;
  std::uint64_t gained = world.index().gained();
  for (int turn = 0; turn < 400; ++turn) {
    if (world.upto(2) == 0) {
      world.come(world.upto(4) == 0 ? prompt : world.draw());
    } else {
      world.leave();
    }
    if (!world.index().tails_right()) fail("a tail is wrong", seed);
    const auto found = world.index().look("", prompt, kLength);
    if (found.held > found.pages) fail("more are held than there are", seed);
    if (gained != world.index().gained()) {
      if (world.upto(3) == 0) continue;  // nobody asked meanwhile
      gained = world.index().gained();
      if (!world.index().deepen(held, "", prompt, kLength)) held = world.index().held(found);
    }
    if (found.held > held.pages) fail("more are held than is remembered", seed);
    if (world.upto(8) == 0) held = world.index().held(found);
  }
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 500; ++seed) run(seed);
  std::printf("what is remembered is never less\n");
}
