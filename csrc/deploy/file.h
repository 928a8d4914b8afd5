// A safetensors file in memory: where its tensors lie, all checked, and what its metadata say.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "deploy/json.h"

namespace fastseq::deploy {

enum class Dtype { f32, f16, bf16, i8, u8 };
const char* name_of(Dtype dtype);
int64_t size_of(Dtype dtype);

struct Tensor {
  std::string name;
  Dtype dtype;
  std::vector<int64_t> shape;
  const uint8_t* data;  // at any alignment
  int64_t count() const;
  std::string text() const;  // "float32 [4, 3]"
};

class File {
 public:
  static File read(const std::string& path);
  // Of bytes that outlive it.
  static File parse(const uint8_t* bytes, size_t size);

  File(File&&) = default;
  File& operator=(File&&) = default;

  const Tensor* find(const std::string& name) const;
  const Tensor& get(const std::string& name) const;
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  File() = default;
  std::vector<uint8_t> bytes_;  // of a file that was read
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace fastseq::deploy
