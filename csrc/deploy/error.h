// What loading and running a model says when it cannot.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastseq::deploy {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A file that cannot be read at all.
class FileError : public Error {
 public:
  using Error::Error;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

}  // namespace fastseq::deploy
