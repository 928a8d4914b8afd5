#include "deploy/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <new>

namespace fastseq::deploy {
namespace {

constexpr std::align_val_t kMatrixAlign{64};

std::string shape_text(const std::vector<int64_t>& shape) {
  Tensor like{"", Dtype::f32, shape, nullptr};
  const std::string text = like.text();
  return text.substr(text.find('['));
}

const Tensor& expect_shape(const Tensor& t, const std::vector<int64_t>& shape) {
  if (t.shape != shape) fail("tensor '", t.name, "' must be ", shape_text(shape), ", got ", t.text());
  return t;
}

float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                     : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

std::vector<float> widened(const Tensor& t) {
  std::vector<float> out(static_cast<size_t>(t.count()));
  if (t.dtype == Dtype::f32) {
    if (!out.empty()) std::memcpy(out.data(), t.data, out.size() * sizeof(float));
  } else if (t.dtype == Dtype::f16 || t.dtype == Dtype::bf16) {
    for (size_t n = 0; n < out.size(); ++n) {
      const auto bits = static_cast<uint16_t>(t.data[2 * n] | t.data[2 * n + 1] << 8);
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      if (t.dtype == Dtype::f16) {
        out[n] = half_value(bits);
      } else {
        std::memcpy(&out[n], &wide, sizeof wide);
      }
    }
  } else {
    fail("tensor '", t.name, "' must hold floats, got ", t.text());
  }
  for (const float value : out) {
    if (!std::isfinite(value)) fail("tensor '", t.name, "' holds ", value, ", which is not a finite number");
  }
  return out;
}

int64_t row_bytes(core::Storage storage, int64_t K) {
  return storage == core::Storage::f32    ? 4 * K
         : storage == core::Storage::bf16 ? 2 * K
         : storage == core::Storage::int8 ? K
                                          : (K + 1) / 2;
}

int64_t groups_of(int64_t group, int64_t K) { return group ? (K + group - 1) / group : 1; }

// Sources of the parts of one matrix, and what had to be copied for them.
class Parts {
 public:
  Parts(const File& file, int64_t group) : file_(file), group_(group) {}

  // A part [N, K] that stands under this very name.
  core::PartSource read(const std::string& name, int64_t N, int64_t K) {
    const Tensor& t = file_.get(name);
    core::PartSource part{};
    if (t.dtype == Dtype::i8 || t.dtype == Dtype::u8) {
      part = integers(t, N, K);
    } else if (expect_shape(t, {N, K}).dtype == Dtype::bf16) {
      widened(t);  // for its checks
      auto& kept = halves_.emplace_back(static_cast<size_t>(N * K));
      std::memcpy(kept.data(), t.data, kept.size() * 2);
      part = {core::Storage::bf16, 0, kept.data(), nullptr};
    } else {
      part = {core::Storage::f32, 0, floats_.emplace_back(widened(t)).data(), nullptr};
    }
    return part;
  }

 private:
  core::PartSource integers(const Tensor& t, int64_t N, int64_t K) {
    const bool nibbles = t.dtype == Dtype::u8;
    expect_shape(t, {N, nibbles ? (K + 1) / 2 : K});
    if (!nibbles && std::memchr(t.data, 0x80, static_cast<size_t>(t.count()))) {
      fail("tensor '", t.name, "' must hold integers of -127 .. 127, got -128");
    }
    const int64_t group = group_ > 0 && group_ < K ? group_ : 0, groups = groups_of(group, K);
    const std::string scale = t.name + ".scale";
    auto& kept = floats_.emplace_back(read_floats(file_, scale, {N, groups}));
    for (const float value : kept) {
      if (value < 0) fail("tensor '", scale, "' holds ", value, ", a scale is at least 0");
    }
    return {nibbles ? core::Storage::int4 : core::Storage::int8, group, t.data, kept.data()};
  }

  const File& file_;
  int64_t group_;
  std::deque<std::vector<float>> floats_;
  std::deque<std::vector<uint16_t>> halves_;
};

// Rows from `first` on.
core::PartSource rows_from(core::PartSource part, int64_t first, int64_t K) {
  part.values = static_cast<const uint8_t*>(part.values) + first * row_bytes(part.storage, K);
  if (part.scale) part.scale += first * groups_of(part.group, K);
  return part;
}

int64_t rank_of(const File& file, const std::string& name) {
  const Tensor& down = file.get(name + ".down");
  if (down.shape.size() != 2 || down.shape[0] < 1)
    fail("tensor '", down.name, "' must be [rank, K], got ", down.text());
  return down.shape[0];
}

core::MatrixSource source_of(const File& file, const std::string& name, int64_t N, int64_t K, const Matrix::Form& form,
                             Parts& parts) {
  core::MatrixSource s{};
  s.N = N;
  s.K = K;
  s.gates = form.gates;
  s.bounded = form.bounded;
  const int64_t H = N / form.gates;
  const bool by_gate = form.gates == 4 && (file.find(name + ".i") || file.find(name + ".i.up"));
  s.shared_down = form.gates == 4 && !by_gate && file.find(name + ".up");
  core::PartSource rows{}, down{};
  int64_t rank = 0;
  for (int g = 0; g < form.gates; ++g) {
    if (by_gate || g == 0) {
      const std::string part = by_gate ? name + '.' + "ifgo"[g] : name;
      const int64_t count = by_gate ? H : N;
      rank = file.find(part + ".up") ? rank_of(file, part) : 0;
      rows = parts.read(rank ? part + ".up" : part, count, rank ? rank : K);
      down = rank ? parts.read(part + ".down", rank, K) : core::PartSource{};
    }
    s.gate[g].rank = rank;
    s.gate[g].rows = by_gate ? rows : rows_from(rows, g * H, rank ? rank : K);
    s.gate[g].down = down;
  }
  return s;
}

}  // namespace

std::vector<float> read_floats(const File& file, const std::string& name, const std::vector<int64_t>& shape) {
  return widened(expect_shape(file.get(name), shape));
}

std::vector<float> read_optional(const File& file, const std::string& name, const std::vector<int64_t>& shape) {
  return file.find(name) ? read_floats(file, name, shape) : std::vector<float>();
}

void Matrix::Free::operator()(uint8_t* memory) const { ::operator delete(memory, kMatrixAlign); }

Matrix Matrix::read(const File& file, const std::string& name, int64_t N, int64_t K, const Form& form) {
  Parts parts(file, form.group);
  const core::MatrixSource source = source_of(file, name, N, K, form, parts);
  if (const char* const fault = core::matrix_fault(source)) fail("matrix '", name, "': ", fault);
  Matrix out;
  out.bytes_ = core::packed_bytes(source);
  out.memory_.reset(static_cast<uint8_t*>(::operator new(out.bytes_, kMatrixAlign)));
  core::pack_matrix(source, out.memory_.get());
  if (!core::open_matrix(out.memory_.get(), out.bytes_, &out.packed_)) fail("matrix '", name, "' was packed wrongly");
  return out;
}

Table Table::read(const File& file, const std::string& name, int64_t N, int64_t K, int64_t group) {
  Parts parts(file, group);
  Table out;
  out.K_ = K;
  out.rank_ = file.find(name + ".up") ? rank_of(file, name) : 0;
  if (!out.rank_) {
    out.rows_ = kept(parts.read(name, N, K), N, K);
    return out;
  }
  out.rows_ = kept(parts.read(name + ".up", N, out.rank_), N, out.rank_);
  const Part down = kept(parts.read(name + ".down", out.rank_, K), out.rank_, K);
  out.down_.resize(static_cast<size_t>(out.rank_ * K));
  for (int64_t r = 0; r < out.rank_; ++r) down.row(r, out.down_.data() + r * K);
  return out;
}

Table::Part Table::kept(const core::PartSource& source, int64_t N, int64_t K) {
  Part part{source.storage, K, source.group ? source.group : K, {}, {}};
  const auto* const values = static_cast<const uint8_t*>(source.values);
  part.values.assign(values, values + N * row_bytes(source.storage, K));
  if (source.scale) part.scale.assign(source.scale, source.scale + N * groups_of(source.group, K));
  return part;
}

void Table::Part::row(int64_t n, float* out) const {
  const uint8_t* const from = values.data() + n * row_bytes(storage, K);
  const float* const own = scale.data() + n * groups_of(group, K);
  if (storage == core::Storage::f32) {
    std::memcpy(out, from, static_cast<size_t>(K) * sizeof(float));
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    if (storage == core::Storage::bf16) {
      const uint32_t wide = static_cast<uint32_t>(from[2 * k] | from[2 * k + 1] << 8) << 16;
      std::memcpy(out + k, &wide, sizeof(float));
    } else {
      const int value =
          storage == core::Storage::int8 ? static_cast<int8_t>(from[k]) : (from[k / 2] >> 4 * (k & 1) & 15) - 8;
      out[k] = static_cast<float>(value) * own[k / group];
    }
  }
}

void Table::row(int64_t n, float* out) const {
  if (!rank_) return rows_.row(n, out);
  std::vector<float> up(static_cast<size_t>(rank_));
  rows_.row(n, up.data());
  std::fill_n(out, K_, 0.0f);
  for (int64_t r = 0; r < rank_; ++r) {
    for (int64_t k = 0; k < K_; ++k) out[k] += up[static_cast<size_t>(r)] * down_[static_cast<size_t>(r * K_ + k)];
  }
}

}  // namespace fastseq::deploy
