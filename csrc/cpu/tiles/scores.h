// Scores of a block of queries against tiles of keys (6), (7), by products in tiles. They are without the scale.
#pragma once

#include "pack.h"

namespace deberta_fast::DEBERTA_FAST_ISA {

constexpr int64_t kStrip = kTileRows * kTile;  // rows of a product that is stored with skew
constexpr int64_t kMargin = 32;  // cells to the left of a matrix that is written or read with skew, and to its right

// The table of head `head` expanded to distances, from the distance in cell `first` on.
INLINE const uint16_t* by_distance(const Attention& a, const float* tables, int64_t head, int64_t first) {
  return reinterpret_cast<const uint16_t*>(tables + head * a.padded_size * a.pitch) + first * a.padded_size;
}

// The base of the forward and backward passes.
class ScoreTiles {
 protected:
  explicit ScoreTiles(const Attention& a)
      : a_(a), size_(a.padded_size), depth_(size_ / kDepth), scale_(static_cast<float>(a.scale * kLog2e)) {}

  static uint16_t* carve_halves(Carver& carver, int64_t count) {
    return reinterpret_cast<uint16_t*>(carver(div_up(count, 2)));
  }

  // `keys`: the most keys that are loaded at once; `tile_keys`: the most keys of a tile.
  void carve_scores(Carver& carver, int64_t keys, int64_t tile_keys) {
    keys = round_up(keys, kPaddedRows) + kPaddedRows;  // a tile may reach beyond the last keys
    pitch_ = tile_keys + kMargin;
    query_ = carve_halves(carver, kMaxBlockRows * size_);
    key_ = carve_halves(carver, keys * size_), key_t_ = carve_halves(carver, keys * size_);
    far_key_rows_ = carve_halves(carver, kPaddedRows * size_);
    far_query_rows_ = carve_halves(carver, kPaddedRows * size_);
    far_rows_ = carve_halves(carver, kPaddedRows * size_);
    far_terms_ = carver(std::max(keys, kMaxBlockRows) * kTile);
    for (float*& terms : far_key_terms_) terms = carver(keys);
    scores_ = carver(kMargin + kMaxBlockRows * pitch_ + kMargin) + kMargin;
    p2c_ = carver(kMargin + kStrip * kQueryPitch + kMargin) + kMargin;
    bias_ = carver(round_up(a_.longest_key, kPaddedRows));
  }

  // Loads keys [start, stop) of a sequence.
  void load_key_rows(const Sequence& sequence, int64_t head, int64_t start, int64_t stop) {
    const int64_t count = round_up(stop - start, kPaddedRows);
    copy_padded(rows_of<Bfloat16>(a_.key, sequence.batch, head, sequence.first_key + start), stop - start, a_.size,
                key_, size_);
    std::fill_n(key_ + count * size_, kPaddedRows * size_, uint16_t{0});
    pack_transposed(key_, count + kPaddedRows, size_, key_t_);
    if (a_.pos_key.data) pack_far_rows(a_.pos_key, head, far_key_rows_);
    if (a_.pos_query.data == nullptr) return;
    pack_far_rows(a_.pos_query, head, far_query_rows_);
    products_with_far_rows(key_, count + kPaddedRows, far_query_rows_, far_key_terms_[kPast], far_key_terms_[kFuture]);
  }

  void load_query(const Sequence& sequence, const Block& block) {
    copy_padded(rows_of<Bfloat16>(a_.query, sequence.batch, block.head, sequence.first_query + block.first), block.rows,
                a_.size, query_, size_);
    for (auto& constants : far_constants_) std::fill_n(constants, kMaxBlockRows, 0.0f);
    if (a_.pos_key.data == nullptr) return;  // zeros times an infinite query would be NaN
    products_with_far_rows(query_, padded_rows(block), far_key_rows_, far_constants_[kPast], far_constants_[kFuture]);
    for (auto& constants : far_constants_) {
      for (float& constant : constants) constant *= scale_;
    }
  }

  static int64_t padded_rows(const Block& block) { return round_up(block.rows, kPaddedRows); }

  // Scores in base 2 are Z = factor score + constant of the query. The factor is above 0, so that hidden pairs keep minus
  // infinity and the largest score the largest Z.
  float factor() const { return scale_ > 0 ? scale_ : 1; }
  const float* constants(Side side) const { return far_constants_[side]; }

  // Calls use(side, key, count) for each tile of the keys [start, stop) that has a visible pair, with its scores in
  // scores_, rounded up to kPaddedRows keys. A tile has at most tile_keys keys and ends at a multiple of tile_keys,
  // counted from first_key, the first of the loaded keys, or at the end of its segment. A far tile's scores lack
  // constants(side) (7).
  template <class Use>
  void for_each_tile(const Block& block, const Block& stretch, int64_t first_key, int64_t start, int64_t stop,
                     int64_t tile_keys, Use use) {
    Segment segments[3];
    cut_segments(a_, stretch, start, stop, segments);
    for (const Segment& segment : segments) {
      for (int64_t key = segment.start, next; key < segment.stop; key = next) {
        next = std::min(first_key + round_down(key - first_key, tile_keys) + tile_keys, segment.stop);
        if (!visible_.any(a_, block.first, block.rows, key, next - key)) continue;
        scores(block, segment.side, key - first_key, key, next - key);
        const int64_t columns = round_up(next - key, kLanes);
        if (factor() != scale_) scale_scores(block.rows, columns);
        visible_.hide(a_, block.first, block.rows, key, columns, scores_, pitch_);
        use(segment.side, key, next - key);
      }
    }
  }

  const Attention& a_;
  const int64_t size_, depth_;  // D rounded up, in numbers and in tiles
  const float scale_;           // log2(e) s
  int64_t pitch_ = 0;           // of scores_
  VisibleKeys visible_;
  uint16_t *query_, *key_, *key_t_;  // (rows, D); (keys, D); packed for products that sum over D
  float *scores_, *bias_;            // (rows, pitch); of VisibleKeys

 private:
  // Packs the rows of a table that far keys read on either side, and zeros, as 16 columns.
  void pack_far_rows(const Table& table, int64_t head, uint16_t* to) {
    const auto row = [&](int64_t side) {
      const int64_t slot = slot_of(a_, side == kPast ? a_.reach : -a_.reach);
      return static_cast<const uint16_t*>(table.data) + head * table.head + slot * table.row;
    };
    copy_padded(row, 2, a_.size, far_rows_, size_);
    pack_transposed(far_rows_, kPaddedRows, size_, to);
  }

  // Multiplies each row with the far row of either side.
  void products_with_far_rows(const uint16_t* rows, int64_t count, const uint16_t* far_rows, float* past,
                              float* future) {
    product(count / kTile, 1, depth_, {rows, size_}, packed(far_rows, size_), {}, {far_terms_, kTile});
    for (int64_t r = 0; r < count; ++r) past[r] = far_terms_[r * kTile], future[r] = far_terms_[r * kTile + 1];
  }

  // Computes the scores of `count` keys from `key` on, which is loaded key `local`. The content term is added to the
  // others. The scores of rows and keys in the padding are not used.
  //
  // c2p: a strip of m queries and n keys has n + m - 1 distances. Row r of their product with K^e is stored one cell further
  // right than row r - 1, so that cell e of each row falls on its key. p2c is the same with keys in place of queries, and is
  // transposed.
  void scores(const Block& block, Side side, int64_t local, int64_t key, int64_t count) {
    const int64_t rows = padded_rows(block), columns = round_up(count, kPaddedRows);
    const int64_t last_distance = a_.first_distance + a_.distances - 1;
    Terms terms{};
    if (side == kNear && a_.pos_key.data) {
      for (int64_t r = 0; r < rows; r += kStrip) {
        const int64_t first = key - (block.position + r) - kStrip - a_.first_distance;
        const uint16_t* const table = by_distance(a_, a_.key_by_distance_t, block.head, first);
        product(kTileRows, (columns + kStrip) / kTile, depth_, {query_ + r * size_, size_}, packed(table, size_), {},
                {scores_ + r * pitch_ - kStrip, pitch_ + 1});
      }
    }
    if (side == kNear && a_.pos_query.data) {
      for (int64_t k = 0; k < columns; k += kStrip) {
        const int64_t first = block.position - (key + k) - kStrip + last_distance;
        const uint16_t* const table = by_distance(a_, a_.query_by_distance_t, block.head, first);
        product(kTileRows, (rows + kStrip) / kTile, depth_, {key_ + (local + k) * size_, size_}, packed(table, size_),
                {}, {p2c_ - kStrip, kQueryPitch + 1});
        add_transposed(rows, scores_ + k);
      }
    }
    if (side == kNear) {
      terms = {scores_, pitch_};
    } else if (a_.pos_query.data) {
      terms = {far_key_terms_[side] + local, 0};
    }
    product(rows / kTile, columns / kTile, depth_, {query_, size_}, packed(key_t_ + local * size_, size_), terms,
            {scores_, pitch_});
  }

  // Adds the p2c scores of kStrip keys to the c2p scores, or stores them if there are none.
  void add_transposed(int64_t rows, float* to) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      for (int64_t k = 0; k < kStrip; k += kLanes) {
        Vector square[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) square[l] = load(p2c_ + (k + l) * kQueryPitch + i);
        transpose(square);
        float* const first = to + i * pitch_ + k;
        for (int64_t l = 0; l < kLanes; ++l) {
          const Vector sum = a_.pos_key.data ? load(first + l * pitch_) + square[l] : square[l];
          store(first + l * pitch_, sum);
        }
      }
    }
  }

  void scale_scores(int64_t rows, int64_t columns) {
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = scores_ + r * pitch_;
      for (int64_t c = 0; c < columns; c += kLanes) store(row + c, load(row + c) * scale_);
    }
  }

  static constexpr int64_t kQueryPitch = kMaxBlockRows + kMargin;  // of p2c_
  uint16_t *far_key_rows_, *far_query_rows_, *far_rows_;           // packed; (kPaddedRows, D) while packing
  float *far_terms_, *far_key_terms_[2];                           // (rows, 16); (keys) on either side
  float far_constants_[2 + 1][kMaxBlockRows];                      // of either side; zeros for near keys
  float* p2c_;                                                     // (kStrip, kQueryPitch)
};

}  // namespace deberta_fast::DEBERTA_FAST_ISA
