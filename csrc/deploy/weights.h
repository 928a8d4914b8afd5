// Weights out of a file: vectors of floats, and matrices in any of the forms that a file may hold, packed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/matrix.h"
#include "deploy/file.h"

namespace fastseq::deploy {

// Finite floats of this shape; float16 and bfloat16 are widened.
std::vector<float> read_floats(const File& file, const std::string& name, const std::vector<int64_t>& shape);
// The same, or nothing where the file has no such tensor.
std::vector<float> read_optional(const File& file, const std::string& name, const std::vector<int64_t>& shape);

// A matrix [N, K] that is packed. What stands under its name: floats; int8 or uint8 (4 bits) with `.scale`; `.up` and
// `.down`; or with four gates `.i`, `.f`, `.g`, `.o`.
class Matrix {
 public:
  struct Form {
    int gates;      // 1 or 4
    bool bounded;   // see core/matrix.h
    int64_t group;  // columns that share a scale, 0: all
  };
  static Matrix read(const File& file, const std::string& name, int64_t N, int64_t K, const Form& form);

  const core::PackedMatrix& packed() const { return packed_; }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t bytes_ = 0;
  core::PackedMatrix packed_{};
};

// A matrix [N, K] whose rows are looked up, kept as the file has it: in any form of one gate.
class Table {
 public:
  static Table read(const File& file, const std::string& name, int64_t N, int64_t K, int64_t group);
  void row(int64_t n, float* out) const;  // [K]

 private:
  struct Part {
    core::Storage storage;
    int64_t K, group;
    std::vector<uint8_t> values;
    std::vector<float> scale;
    void row(int64_t n, float* out) const;
  };
  static Part kept(const core::PartSource& source, int64_t N, int64_t K);

  int64_t K_ = 0, rank_ = 0;
  Part rows_;                // of the upper factor where there is a rank
  std::vector<float> down_;  // [rank, K]
};

}  // namespace fastseq::deploy
