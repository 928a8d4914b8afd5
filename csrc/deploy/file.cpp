#include "deploy/file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

namespace fastseq::deploy {
namespace {

constexpr uint64_t kMostHeader = uint64_t(32) << 20;
constexpr size_t kMostDims = 4;

struct TypeName {
  const char* in_file;
  const char* told;
  int64_t size;
};
constexpr TypeName kDtypes[] = {
    {"F32", "float32", 4}, {"F16", "float16", 2}, {"BF16", "bfloat16", 2}, {"I8", "int8", 1}, {"U8", "uint8", 1}};

Dtype dtype_of(const std::string& tensor, const Json* value) {
  if (!value || value->kind != Json::Kind::text) fail("tensor '", tensor, "': dtype must be a string");
  for (int n = 0; n < 5; ++n) {
    if (value->text == kDtypes[n].in_file) return static_cast<Dtype>(n);
  }
  fail("tensor '", tensor, "': dtype must be F32, F16, BF16, I8 or U8, got ", value->text);
}

uint64_t offset(const std::string& tensor, const Json& value) {
  if (value.kind != Json::Kind::integer || value.integer < 0) {
    fail("tensor '", tensor, "': data_offsets must be two integers of at least 0");
  }
  return static_cast<uint64_t>(value.integer);
}

std::vector<int64_t> shape_of(const std::string& tensor, const Json* value) {
  if (!value || value->kind != Json::Kind::list || value->list.size() > kMostDims) {
    fail("tensor '", tensor, "': shape must be a list of at most ", kMostDims, " sizes");
  }
  std::vector<int64_t> shape;
  for (const Json& size : value->list) {
    if (size.kind != Json::Kind::integer || size.integer < 0) {
      fail("tensor '", tensor, "': sizes must be integers of at least 0, got ", size.dump());
    }
    shape.push_back(size.integer);
  }
  return shape;
}

struct Span {
  uint64_t begin, end;
  std::string name;
};

Tensor read_tensor(const std::string& name, const Json& entry, const uint8_t* data, uint64_t size,
                   std::vector<Span>& spans) {
  if (entry.kind != Json::Kind::object) fail("tensor '", name, "': its entry must be an object");
  Tensor t{name, dtype_of(name, entry.find("dtype")), shape_of(name, entry.find("shape")), nullptr};
  const Json* const offsets = entry.find("data_offsets");
  if (!offsets || offsets->kind != Json::Kind::list || offsets->list.size() != 2) {
    fail("tensor '", name, "': data_offsets must be two integers of at least 0");
  }
  const uint64_t begin = offset(name, offsets->list[0]), end = offset(name, offsets->list[1]);
  if (begin > end || end > size) {
    fail("tensor '", name, "': its data lie at ", begin, " .. ", end, ", the file has ", size, " bytes of data");
  }
  uint64_t bytes = static_cast<uint64_t>(size_of(t.dtype));
  for (const int64_t n : t.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(n), &bytes))
      fail("tensor '", name, "': its shape is too large");
  }
  if (bytes != end - begin) {
    fail("tensor '", name, "': ", t.text(), " takes ", bytes, " bytes, the file gives it ", end - begin);
  }
  t.data = data + begin;
  spans.push_back({begin, end, name});
  return t;
}

void check_spans(std::vector<Span>& spans, uint64_t size) {
  std::sort(spans.begin(), spans.end(),
            [](const Span& a, const Span& b) { return a.begin != b.begin ? a.begin < b.begin : a.end < b.end; });
  uint64_t at = 0;
  for (const Span& span : spans) {
    if (span.begin < at) fail("tensor '", span.name, "': its data overlap those of another tensor");
    if (span.begin > at) fail("bytes ", at, " .. ", span.begin, " of the data belong to no tensor");
    at = span.end;
  }
  if (at != size) fail("bytes ", at, " .. ", size, " of the data belong to no tensor");
}

}  // namespace

const char* name_of(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].told; }
int64_t size_of(Dtype dtype) { return kDtypes[static_cast<int>(dtype)].size; }

int64_t Tensor::count() const {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

std::string Tensor::text() const {
  std::string out = std::string(name_of(dtype)) + " [";
  for (size_t n = 0; n < shape.size(); ++n) out += (n ? ", " : "") + std::to_string(shape[n]);
  return out + "]";
}

const Tensor* File::find(const std::string& name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const Tensor& File::get(const std::string& name) const {
  const Tensor* const found = find(name);
  if (!found) fail("tensor '", name, "' is missing");
  return *found;
}

File File::read(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!stream) throw FileError(path + ": cannot open it: " + std::strerror(errno));
  std::vector<uint8_t> bytes;
  for (size_t used = 0;;) {
    bytes.resize(std::max<size_t>(used * 2, size_t(1) << 20));
    const size_t got = std::fread(bytes.data() + used, 1, bytes.size() - used, stream.get());
    used += got;
    if (got == 0) {
      if (std::ferror(stream.get())) throw FileError(path + ": cannot read it: " + std::strerror(errno));
      bytes.resize(used);
      break;
    }
  }
  File file = parse(bytes.data(), bytes.size());
  file.bytes_ = std::move(bytes);  // its memory stays where it is
  return file;
}

File File::parse(const uint8_t* bytes, size_t size) {
  uint64_t length = 0;
  if (size < sizeof length) fail("not a safetensors file: it has ", size, " bytes");
  for (int n = 7; n >= 0; --n) length = length << 8 | bytes[n];
  if (length > size - sizeof length) {
    fail("not a safetensors file, or cut off: its header claims ", length, " bytes, ", size - sizeof length, " follow");
  }
  if (length > kMostHeader) fail("its header of ", length, " bytes is larger than ", kMostHeader);
  const std::string_view text(reinterpret_cast<const char*>(bytes) + sizeof length, length);
  const Json header = Json::parse(text, "header");
  if (header.kind != Json::Kind::object) fail("header: expected an object, got ", header.kind_name());
  File file;
  std::vector<Span> spans;
  const uint8_t* const data = bytes + sizeof length + length;
  const uint64_t data_size = size - sizeof length - length;
  for (size_t n = 0; n < header.names.size(); ++n) {
    const std::string& name = header.names[n];
    const Json& entry = header.list[n];
    if (name != "__metadata__") {
      file.tensors_.emplace(name, read_tensor(name, entry, data, data_size, spans));
      continue;
    }
    if (entry.kind != Json::Kind::object) fail("header: __metadata__ must be an object");
    for (size_t k = 0; k < entry.names.size(); ++k) {
      if (entry.list[k].kind != Json::Kind::text) fail("header: metadata '", entry.names[k], "' must be a string");
      file.metadata_.emplace(entry.names[k], entry.list[k].text);
    }
  }
  check_spans(spans, data_size);
  return file;
}

}  // namespace fastseq::deploy
