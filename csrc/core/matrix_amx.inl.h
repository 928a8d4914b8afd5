// Products of many rows of integers by AMX: register tiles of 16 rows and 64 bytes. A step is 64 columns; a panel of
// int8 is a row of such tiles already. Without the instructions the same body runs on arrays, for tests.
namespace fastseq::core::FASTSEQ_ISA {
namespace {

constexpr int64_t kAmxStep = 64, kAmxRows = 16;
constexpr int64_t kAmxLeastRows = 4;

#if defined(__AMX_INT8__)
struct alignas(64) AmxShape {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
#define amx_zero _tile_zero
#define amx_load _tile_loadd
#define amx_store _tile_stored
#define amx_multiply _tile_dpbsud
#else
struct AmxShape {
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
struct AmxTiles {
  AmxShape shape;
  int32_t value[8][16][16];
};
AmxTiles* amx_state() {
  static thread_local AmxTiles state;
  return &state;
}
inline void _tile_loadconfig(const AmxShape* shape) { amx_state()->shape = *shape; }
inline void _tile_release() {}
inline void amx_zero(int tile) { __builtin_memset(amx_state()->value[tile], 0, sizeof amx_state()->value[tile]); }
inline void amx_load(int tile, const void* from, int64_t stride) {
  AmxTiles& s = *amx_state();
  for (int i = 0; i < s.shape.rows[tile]; ++i) __builtin_memcpy(s.value[tile][i], (const char*)from + i * stride, 64);
}
inline void amx_store(int tile, void* to, int64_t stride) {
  AmxTiles& s = *amx_state();
  for (int i = 0; i < s.shape.rows[tile]; ++i) __builtin_memcpy((char*)to + i * stride, s.value[tile][i], 64);
}
inline void amx_multiply(int c, int a, int b) {
  AmxTiles& s = *amx_state();
  for (int i = 0; i < s.shape.rows[c]; ++i) {
    for (int k = 0; k < 16; ++k) {
      const int8_t* const x = (const int8_t*)&s.value[a][i][k];
      for (int j = 0; j < 16; ++j) {
        const uint8_t* const w = (const uint8_t*)&s.value[b][k][j];
        for (int n = 0; n < 4; ++n) s.value[c][i][j] += x[n] * w[n];
      }
    }
  }
}
#endif

// The tiles: 0 .. 3 results, 4 and 5 rows, 6 and 7 panels. Rows that do not lie evenly apart are copied, step by step.
struct AmxRows {
  const MatrixTile& t;
  int64_t stride;  // 0: copy
  alignas(64) int8_t copy[2][kAmxRows][kAmxStep];

  explicit AmxRows(const MatrixTile& tile) : t(tile), stride(kAmxStep) {
    if (t.rows > 1) stride = (const int8_t*)t.a[1] - (const int8_t*)t.a[0];
    for (int64_t i = 1; i < t.rows; ++i) {
      if ((const int8_t*)t.a[i] - (const int8_t*)t.a[i - 1] != stride) stride = 0;
    }
  }
  const int8_t* at(int half, int64_t k) {
    const int64_t first = half * kAmxRows;
    if (stride) return (const int8_t*)t.a[first] + k;
    for (int64_t i = first; i < t.rows && i < first + kAmxRows; ++i) {
      __builtin_memcpy(copy[half][i - first], (const int8_t*)t.a[i] + k, kAmxStep);
    }
    return copy[half][0];
  }
  int64_t apart() const { return stride ? stride : kAmxStep; }
};

// Adds a tile of integers to the results of a panel, with its scale.
inline void amx_finish(const MatrixTile& t, const int32_t* sums, int64_t first_row, int64_t panel, int64_t group,
                       bool last) {
  constexpr int V = kPanelVectors;
  const float* const scale = t.scale + panel * t.scale_panel + group * kMatrixPanel;
  for (int64_t i = first_row; i < t.rows && i < first_row + kAmxRows; ++i) {
    const VecI32 shift = VecI32{} + 128 * t.sums[i][group];
    const VecF times = broadcast(t.a_scale[0] && last ? *t.a_scale[i] : 1.0f);
    float* const c = t.c + i * t.c_row + panel * t.c_panel;
    for (int v = 0; v < V; ++v) {
      const VecI32 total = load_words((const uint8_t*)(sums + (i - first_row) * 16 + v * kLanes<float>)) - shift;
      VecF value = __builtin_convertvector(total, VecF) * load(scale + v * kLanes<float>);
      value += group ? load(c + v * kLanes<float>) : broadcast(0.0f);  // 0, which turns -0 into 0 as elsewhere
      value *= times;
      store(c + v * kLanes<float>, last ? with_bias(t, panel, v, value) : value);
    }
  }
}

// Two tiles of rows by two panels, or one by four.
template <bool Two>
void amx_panels(const MatrixTile& t, AmxRows& rows, int64_t panel, int64_t count) {
  alignas(64) int32_t sums[4][16][16];
  const uint8_t* const b = t.b + panel * t.b_panel;
  int64_t group = 0;
  for (int64_t begin = 0; begin < t.K; begin += t.group, ++group) {
    const int64_t end = begin + t.group < t.K ? begin + t.group : t.K;
    amx_zero(0);
    amx_zero(1);
    amx_zero(2);
    amx_zero(3);
    for (int64_t k = begin; k < end; k += kAmxStep) {
      const uint8_t* const from = b + k * kMatrixPanel;
      amx_load(4, rows.at(0, k), rows.apart());
      amx_load(6, from, 64);
      amx_multiply(0, 4, 6);
      if constexpr (Two) {
        amx_load(5, rows.at(1, k), rows.apart());
        amx_multiply(2, 5, 6);
        if (count == 1) continue;
        amx_load(7, from + t.b_panel, 64);
        amx_multiply(1, 4, 7);
        amx_multiply(3, 5, 7);
      } else {
        if (count == 1) continue;
        amx_load(7, from + t.b_panel, 64);
        amx_multiply(1, 4, 7);
        if (count == 2) continue;
        amx_load(6, from + 2 * t.b_panel, 64);
        amx_multiply(2, 4, 6);
        if (count == 3) continue;
        amx_load(7, from + 3 * t.b_panel, 64);
        amx_multiply(3, 4, 7);
      }
    }
    amx_store(0, sums[0], 64);
    amx_store(1, sums[1], 64);
    amx_store(2, sums[2], 64);
    amx_store(3, sums[3], 64);
    for (int64_t n = 0; n < count; ++n) {
      amx_finish(t, sums[n][0], 0, panel + n, group, end == t.K);
      if (Two) amx_finish(t, sums[2 + n][0], kAmxRows, panel + n, group, end == t.K);
    }
  }
}

inline bool amx_takes(const MatrixTile& t) {
  return t.storage == Storage::int8 && t.rows >= kAmxLeastRows && t.K > kAmxStep / 2 &&
         (t.group >= t.K || t.group % kAmxStep == 0);
}

void amx_tile(const MatrixTile& t) {
  const bool two = t.rows > kAmxRows;
  AmxShape shape;
  for (int n = 0; n < 8; ++n) shape.bytes[n] = 64;
  const uint8_t first = (uint8_t)(two ? kAmxRows : t.rows), second = (uint8_t)(two ? t.rows - kAmxRows : t.rows);
  shape.rows[0] = shape.rows[1] = shape.rows[4] = first;
  shape.rows[2] = shape.rows[3] = shape.rows[5] = second;
  shape.rows[6] = shape.rows[7] = kAmxRows;
  _tile_loadconfig(&shape);
  AmxRows rows(t);
  const int64_t step = two ? 2 : 4;
  for (int64_t p = 0; p < t.panels; p += step) {
    const int64_t count = t.panels - p < step ? t.panels - p : step;
    two ? amx_panels<true>(t, rows, p, count) : amx_panels<false>(t, rows, p, count);
  }
  _tile_release();
}

}  // namespace
}  // namespace fastseq::core::FASTSEQ_ISA
