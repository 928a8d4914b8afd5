#include "deploy/layer.h"

#include <new>

namespace fastseq::deploy {
namespace {

constexpr std::align_val_t kAlign{64};

std::string told(const Shape& shape) {
  return shape.index ? "integers" : "[T, B, " + std::to_string(shape.C) + "] floats";
}

}  // namespace

void Buffer::Free::operator()(void* memory) const { ::operator delete(memory, kAlign); }

void* Buffer::bytes(size_t size) {
  if (size > size_ || !memory_) {
    memory_.reset();
    memory_.reset(::operator new(size + 64, kAlign));
    size_ = size;
  }
  return memory_.get();
}

void Description::wrong(const std::string& message) const { fail("layer '", name, "': ", message); }

int64_t Description::size(const char* field, int64_t least, int64_t most) const {
  const Json* const value = json_.find(field);
  if (!value) wrong(std::string(field) + " is missing");
  if (value->kind != Json::Kind::integer || value->integer < least || value->integer > most) {
    wrong(std::string(field) + " must be an integer of " + std::to_string(least) + " .. " + std::to_string(most) +
          ", got " + value->dump());
  }
  return value->integer;
}

int64_t Description::size(const char* field, int64_t least, int64_t most, int64_t otherwise) const {
  return json_.find(field) ? size(field, least, most) : otherwise;
}

double Description::real(const char* field, double otherwise) const {
  const Json* const value = json_.find(field);
  if (!value) return otherwise;
  if (value->kind != Json::Kind::integer && value->kind != Json::Kind::real) {
    wrong(std::string(field) + " must be a number, got " + value->dump());
  }
  return value->real;
}

bool Description::flag(const char* field, bool otherwise) const {
  const Json* const value = json_.find(field);
  if (!value) return otherwise;
  if (value->kind != Json::Kind::boolean) wrong(std::string(field) + " must be true or false, got " + value->dump());
  return value->boolean;
}

std::string Description::text(const char* field, const char* otherwise) const {
  const Json* const value = json_.find(field);
  if (!value) return otherwise;
  if (value->kind != Json::Kind::text) wrong(std::string(field) + " must be a string, got " + value->dump());
  return value->text;
}

void Description::expect(const std::vector<Shape>& inputs, bool index, int64_t C) const {
  if (inputs.size() != 1) wrong("it takes one input, got " + std::to_string(inputs.size()));
  const Shape& got = inputs[0];
  if (got.index == index && (index || got.C == C)) return;
  wrong("it takes " + told({index, C}) + ", got " + told(got));
}

}  // namespace fastseq::deploy
