// The packed form of a matrix: a head that says what it is made of, then its parts, each at a multiple of 64 bytes.
#include "core/matrix.h"

#include <cstring>

namespace fastseq::core {
namespace {

constexpr uint64_t kMagic = 0x3158525441534601;  // first of the head: so that other bytes are not taken for a matrix

struct PartHead {
  int64_t storage, group;
};
struct Head {
  uint64_t magic;
  int64_t bytes, N, K, gates, bounded;
  int64_t rank[4];
  PartHead rows[4], down;
};

constexpr int64_t kLine = 64;
constexpr int64_t lines(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

bool valid(const PartHead& part, int64_t K) {
  if (part.storage < 0 || part.storage >= kStorages) return false;
  return part.group == K || (part.group > 0 && part.group < K && part.group % 8 == 0);
}

bool valid(int64_t N, int64_t K) { return N > 0 && K > 0 && N <= kMostMatrixSize && K <= kMostMatrixSize; }

bool valid(const Head& head) {
  if (head.magic != kMagic || (head.gates != 1 && head.gates != 4) || head.N % head.gates || head.bounded >> 1)
    return false;
  if (!valid(head.N / head.gates, head.K)) return false;
  bool factors = false;
  for (int g = 0; g < head.gates; ++g) {
    const int64_t rank = head.rank[g];
    if (rank < 0 || rank > kMostMatrixSize || !valid(head.rows[g], rank ? rank : head.K)) return false;
    factors = factors || rank;
  }
  return !factors || valid(head.down, head.K);
}

Head head_of(const MatrixSource& s) {
  Head head{};
  head.magic = kMagic;
  head.N = s.N;
  head.K = s.K;
  head.gates = s.gates;
  head.bounded = s.bounded;
  for (int g = 0; g < s.gates; ++g) {
    const auto& gate = s.gate[g];
    const auto part = [](const PartSource& p, int64_t K) {
      const bool grouped = is_integer(p.storage) && p.group > 0 && p.group < K;
      return PartHead{static_cast<int64_t>(p.storage), grouped ? p.group : K};
    };
    head.rank[g] = gate.rank;
    head.rows[g] = part(gate.rows, gate.rank ? gate.rank : s.K);
    if (gate.rank) head.down = part(gate.down, s.K);
  }
  return head;
}

// Hands out places in the packed bytes. Without bytes it only counts.
struct Places {
  const uint8_t* base;
  int64_t used = lines(sizeof(Head));
  const uint8_t* take(int64_t bytes) {
    const int64_t at = used;
    used += lines(bytes);
    return base ? base + at : nullptr;
  }
};

int64_t panel_bytes(Storage storage, int64_t K) {
  if (storage == Storage::int8 && K > 32) K = (K + 63) / 64 * 64;  // whole steps of AMX
  const int64_t step = storage_step(storage);
  return (K + step - 1) / step * kLine;
}

Piece piece(const PartHead& part, int64_t N, int64_t K) {
  Piece p{};
  p.storage = static_cast<Storage>(part.storage);
  p.N = N;
  p.K = K;
  p.group = part.group;
  p.stride = panel_bytes(p.storage, K);
  p.scale_stride = is_integer(p.storage) ? p.groups() * kMatrixPanel : 0;
  return p;
}

// Places for `count` pieces of the same form whose panels lie side by side.
void place(Places& places, Piece* const* pieces, int count) {
  const Piece form = *pieces[0];
  const uint8_t* const data = places.take(form.panels() * count * form.stride);
  const int64_t scales = form.panels() * count * form.scale_stride * static_cast<int64_t>(sizeof(float));
  const auto* const scale = scales ? reinterpret_cast<const float*>(places.take(scales)) : nullptr;
  for (int n = 0; n < count; ++n) {
    Piece& p = *pieces[n];
    p.data = data ? data + n * form.stride : nullptr;
    p.scale = scale ? scale + n * form.scale_stride : nullptr;
    p.stride = form.stride * count;
    p.scale_stride = form.scale_stride * count;
  }
}

// The matrix that a valid head describes, in these bytes or nowhere, and how many it takes.
PackedMatrix lay_out(const Head& head, const uint8_t* bytes, int64_t* size) {
  PackedMatrix m{};
  m.N = head.N;
  m.K = head.K;
  m.gates = static_cast<int>(head.gates);
  m.bounded = head.bounded != 0;
  m.alike = true;
  int64_t values = 0;
  Piece* pieces[4];
  for (int g = 0; g < m.gates; ++g) {
    const int64_t rank = head.rank[g];
    m.gate[g] = {piece(head.rows[g], m.N / m.gates, rank ? rank : m.K), rank, values};
    values += (rank + kMatrixPanel - 1) / kMatrixPanel * kMatrixPanel;
    pieces[g] = &m.gate[g].piece;
    m.alike = m.alike && rank == head.rank[0] && head.rows[g].storage == head.rows[0].storage &&
              head.rows[g].group == head.rows[0].group;
  }
  Places places{bytes};
  if (m.alike) {
    place(places, pieces, m.gates);
  } else {
    for (int g = 0; g < m.gates; ++g) place(places, pieces + g, 1);
  }
  if (values) {
    m.down = piece(head.down, values, m.K);
    Piece* const down = &m.down;
    place(places, &down, 1);
  }
  *size = places.used;
  return m;
}

// Numbers of the rows n .. n + 15 of a source, by column; zero outside.
struct Columns {
  const PartSource& source;
  int64_t N, K;

  bool inside(int64_t n, int64_t k) const { return n < N && k < K; }
  template <class T>
  T at(int64_t n, int64_t k) const {
    return inside(n, k) ? static_cast<const T*>(source.values)[n * K + k] : T(0);
  }
  int nibble(int64_t n, int64_t k) const {
    if (!inside(n, k)) return 8;
    return static_cast<const uint8_t*>(source.values)[n * ((K + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
  }
};

template <class Put>
void each_row(int64_t from, int64_t columns, Put put) {
  for (int64_t row = 0; row < kMatrixPanel; ++row) {
    for (int64_t k = 0; k < columns; ++k) put(from + row, row, k);
  }
}

// Rows of a source [N, K] into the panels from `first` on. Scales are divided by `by`.
void pack_part(const Piece& p, int64_t first, int64_t N, const PartSource& source, float by) {
  const Columns in{source, N, p.K};
  const int64_t width = panel_bytes(p.storage, p.K) / kLine * storage_step(p.storage), groups = p.groups();
  for (int64_t panel = 0; panel < (N + kMatrixPanel - 1) / kMatrixPanel; ++panel) {
    uint8_t* const out = const_cast<uint8_t*>(p.data) + (first + panel) * p.stride;
    const int64_t from = panel * kMatrixPanel;
    switch (p.storage) {
      case Storage::f32:
        each_row(from, width, [&](int64_t n, int64_t row, int64_t k) {
          reinterpret_cast<float*>(out)[k * kMatrixPanel + row] = in.at<float>(n, k);
        });
        break;
      case Storage::bf16:
        each_row(from, width, [&](int64_t n, int64_t row, int64_t k) {
          reinterpret_cast<uint16_t*>(out)[(k / 2 * kMatrixPanel + row) * 2 + k % 2] = in.at<uint16_t>(n, k);
        });
        break;
      case Storage::int8:
        each_row(from, width, [&](int64_t n, int64_t row, int64_t k) {
          out[(k / 4 * kMatrixPanel + row) * 4 + k % 4] = static_cast<uint8_t>(in.at<int8_t>(n, k) + 128);
        });
        break;
      case Storage::int4:
        each_row(from, width, [&](int64_t n, int64_t row, int64_t k) {
          uint8_t& byte = out[(k / 8 * kMatrixPanel + row) * 4 + k % 4];
          byte = static_cast<uint8_t>(byte | in.nibble(n, k) << k % 8 / 4 * 4);
        });
        break;
    }
    if (!p.scale) continue;
    float* const scale = const_cast<float*>(p.scale) + (first + panel) * p.scale_stride;
    each_row(from, groups, [&](int64_t n, int64_t row, int64_t g) {
      scale[g * kMatrixPanel + row] = n < N ? source.scale[n * groups + g] / by : 0.0f;
    });
  }
}

}  // namespace

const char* matrix_fault(const MatrixSource& s) {
  if (s.gates != 1 && s.gates != 4) return "a matrix has 1 or 4 gates";
  if (!valid(head_of(s))) return "sizes must be 1 .. 65536 a gate, and a group a multiple of 8";
  const PartSource* down = nullptr;
  for (int g = 0; g < s.gates; ++g) {
    const auto& gate = s.gate[g];
    if (!gate.rank) continue;
    const bool same = !down || (gate.down.storage == down->storage && gate.down.group == down->group);
    if (!same) return "the lower factors of all gates must be kept in the same way";
    down = &gate.down;
  }
  return nullptr;
}

size_t packed_bytes(const MatrixSource& source) {
  int64_t size;
  lay_out(head_of(source), nullptr, &size);
  return static_cast<size_t>(size);
}

void pack_matrix(const MatrixSource& s, uint8_t* out) {
  Head head = head_of(s);
  const PackedMatrix m = lay_out(head, out, &head.bytes);
  std::memset(out, 0, static_cast<size_t>(head.bytes));
  std::memcpy(out, &head, sizeof head);
  const float by = s.bounded ? 127.0f : 1.0f;
  for (int g = 0; g < s.gates; ++g) {
    const auto& gate = s.gate[g];
    pack_part(m.gate[g].piece, 0, m.N / m.gates, gate.rows, gate.rank ? 1.0f : by);
    if (gate.rank) pack_part(m.down, m.gate[g].offset / kMatrixPanel, gate.rank, gate.down, by);
  }
}

bool open_matrix(const uint8_t* packed, size_t bytes, PackedMatrix* out) {
  Head head;
  if (bytes < sizeof head) return false;
  std::memcpy(&head, packed, sizeof head);
  if (!valid(head)) return false;
  int64_t size;
  *out = lay_out(head, packed, &size);
  return size == head.bytes && static_cast<size_t>(size) == bytes;
}

}  // namespace fastseq::core
