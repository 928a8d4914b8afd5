// What both doors say of an array before the core may touch it: one description, one set of checks, one form of
// message.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastseq::door {

enum class Type { f32, f64, bf16, f16, i64, i32, i8, u8, boolean, other };

inline const char* name_of(Type type) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "int64",
                                    "int32",   "int8",    "uint8",    "bool",    "another type"};
  return kNames[static_cast<int>(type)];
}

// Calls go with a zero of the type, which is float32 or float64.
template <class F>
void by_type(Type type, F&& go) {
  type == Type::f32 ? go(float()) : go(double());
}

struct Array {
  const void* data = nullptr;
  Type type = Type::other;
  int dims = -1;  // -1: not given
  int64_t size[4] = {};
  bool contiguous = true;
  int64_t bytes = 0;  // of an element
  bool given() const { return dims >= 0; }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << op << ": ";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

inline std::string shape(const int64_t* size, int dims) {
  std::ostringstream text;
  text << '[';
  for (int i = 0; i < dims; ++i) text << (i ? ", " : "") << size[i];
  text << ']';
  return text.str();
}

// `meaning` names the sizes, as "[4*H, P]".
inline void expect(const char* op, const char* name, const Array& array, Type type, const char* meaning,
                   std::initializer_list<int64_t> size) {
  bool same = array.dims == static_cast<int>(size.size());
  for (int i = 0; same && i < array.dims; ++i) same = array.size[i] == size.begin()[i];
  if (!same) {
    fail(op, name, " must be ", meaning, " = ", shape(size.begin(), static_cast<int>(size.size())), ", got ",
         array.given() ? shape(array.size, array.dims) : "nothing");
  }
  if (array.type != type) fail(op, name, " must be ", name_of(type), ", got ", name_of(array.type));
  if (!array.contiguous) fail(op, name, " must be contiguous");
}

inline void expect_dims(const char* op, const char* name, const Array& array, const char* meaning, int dims) {
  if (array.dims != dims) {
    fail(op, name, " must be ", meaning, ", got ", array.given() ? shape(array.size, array.dims) : "nothing");
  }
}

inline Type float_type(const char* op, const char* name, const Array& array) {
  if (array.type != Type::f32 && array.type != Type::f64) {
    fail(op, name, " must be float32 or float64, got ", name_of(array.type));
  }
  return array.type;
}

}  // namespace fastseq::door
