// JSON as files hold it: strict, of bounded depth and size, every mistake with its place.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "deploy/error.h"

namespace fastseq::deploy {

class Json {
 public:
  enum class Kind { null, boolean, integer, real, text, list, object };

  // The whole of `text`, or an Error that begins with `what`.
  static Json parse(std::string_view text, const char* what);

  Kind kind = Kind::null;
  bool boolean = false;
  int64_t integer = 0;
  double real = 0;  // also of an integer
  std::string text;
  std::vector<Json> list;          // the values of an object too
  std::vector<std::string> names;  // of an object, one for each value

  // The value under a name, or null.
  const Json* find(std::string_view name) const;
  const char* kind_name() const;
  // As JSON again.
  std::string dump() const;
};

}  // namespace fastseq::deploy
