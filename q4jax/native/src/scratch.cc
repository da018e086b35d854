#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace q4jax {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMostKept = size_t{32} << 20;
constexpr size_t kMostPieces = 64;

struct Piece {
  void* data;
  size_t size;
};

struct FreeList {
  FreeList() { pieces.reserve(kMostPieces); }
  std::mutex mutex;
  std::vector<Piece> pieces;
  size_t kept = 0;
};

// Never destroyed: threads of a pool may outlive static objects.
FreeList& free_list() {
  static FreeList* const list = new FreeList;
  return *list;
}

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), size_((bytes / 4096 + 1) * 4096) {
  FreeList& list = free_list();
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    for (Piece& piece : list.pieces) {
      if (piece.size >= size_ && piece.size <= 4 * size_) {
        data_ = piece.data;
        size_ = piece.size;
        list.kept -= size_;
        piece = list.pieces.back();
        list.pieces.pop_back();
        return;
      }
    }
  }
  if (posix_memalign(&data_, kAlignment, size_)) throw std::bad_alloc();
}

Scratch::~Scratch() {
  FreeList& list = free_list();
  {
    std::lock_guard<std::mutex> lock(list.mutex);
    if (list.kept + size_ <= kMostKept && list.pieces.size() < kMostPieces) {
      list.kept += size_;
      list.pieces.push_back({data_, size_});
      return;
    }
  }
  std::free(data_);
}

}  // namespace q4jax
