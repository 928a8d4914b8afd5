#include "deploy/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

namespace fastseq::deploy {
namespace {

constexpr int kMostDepth = 16;
constexpr int64_t kMostValues = 1000000;

class Parser {
 public:
  Parser(std::string_view text, const char* what) : text_(text), what_(what) {}

  Json whole() {
    check_utf8();
    Json value = this->value(0);
    space();
    if (at_ != text_.size()) wrong("nothing more");
    return value;
  }

 private:
  [[noreturn]] void wrong(const char* expected) const {
    fail(what_, ": not JSON: expected ", expected, " at byte ", at_, " of ", text_.size());
  }
  // Every character in its shortest form, none of the halves that stand for others.
  void check_utf8() {
    while (at_ < text_.size()) {
      const auto byte = [&](size_t n) { return at_ + n < text_.size() ? static_cast<uint8_t>(text_[at_ + n]) : 0u; };
      const uint32_t first = byte(0);
      const int more = first < 0x80 ? 0 : first >= 0xc2 && first < 0xe0 ? 1 : first >= 0xe0 && first < 0xf0 ? 2 : 3;
      uint32_t code = more == 0 ? first : first & (0x3fu >> more);
      bool good = first < 0x80 || (first >= 0xc2 && first < 0xf5);
      for (int n = 1; n <= more; ++n) {
        good = good && (byte(static_cast<size_t>(n)) & 0xc0) == 0x80;
        code = code << 6 | (byte(static_cast<size_t>(n)) & 0x3f);
      }
      good = good && !(more == 2 && code < 0x800) && !(more == 3 && (code < 0x10000 || code > 0x10ffff));
      if (!good || (code >= 0xd800 && code < 0xe000)) wrong("UTF-8");
      at_ += static_cast<size_t>(more) + 1;
    }
    at_ = 0;
  }
  void space() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }
  bool next(char c) {
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  Json value(int depth) {
    if (depth > kMostDepth) fail(what_, ": JSON is nested deeper than ", kMostDepth);
    if (++values_ > kMostValues) fail(what_, ": JSON has more than ", kMostValues, " values");
    space();
    Json out;
    if (next('{')) return object(depth);
    if (next('[')) return list(depth);
    if (at_ < text_.size() && text_[at_] == '"') {
      out.kind = Json::Kind::text;
      out.text = string();
    } else if (word("true") || word("false")) {
      out.kind = Json::Kind::boolean;
      out.boolean = text_[at_ - 2] == 'u';
    } else if (!word("null")) {
      number(out);
    }
    return out;
  }

  Json object(int depth) {
    Json out;
    out.kind = Json::Kind::object;
    space();
    if (next('}')) return out;
    do {
      space();
      out.names.push_back(string());
      space();
      if (!next(':')) wrong("':'");
      out.list.push_back(value(depth + 1));
      space();
    } while (next(','));
    if (!next('}')) wrong("',' or '}'");
    std::vector<std::string_view> names(out.names.begin(), out.names.end());
    std::sort(names.begin(), names.end());
    const auto twice = std::adjacent_find(names.begin(), names.end());
    if (twice != names.end()) fail(what_, ": '", *twice, "' stands twice in one object");
    return out;
  }

  Json list(int depth) {
    Json out;
    out.kind = Json::Kind::list;
    space();
    if (next(']')) return out;
    do {
      out.list.push_back(value(depth + 1));
      space();
    } while (next(','));
    if (!next(']')) wrong("',' or ']'");
    return out;
  }

  std::string string() {
    if (!next('"')) wrong("'\"'");
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) wrong("the end of a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) wrong("no control character in a string");
      if (c == '\\') {
        escape(out);
      } else {
        out += c;
      }
    }
  }
  void escape(std::string& out) {
    if (at_ >= text_.size()) wrong("an escape");
    const char c = text_[at_++];
    constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const size_t plain = kFrom.find(c);
    if (plain != std::string_view::npos) return void(out += kTo[plain]);
    if (c != 'u') wrong("an escape");
    uint32_t code = hex();
    if (code >= 0xd800 && code < 0xdc00) {
      if (!word("\\u")) wrong("the second half of a character");
      const uint32_t low = hex();
      if (low < 0xdc00 || low >= 0xe000) wrong("the second half of a character");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    utf8(code, out);
  }
  uint32_t hex() {
    if (text_.size() - at_ < 4) wrong("four hexadecimal digits");
    uint32_t code = 0;
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + at_ + 4, code, 16);
    if (error != std::errc() || end != text_.data() + at_ + 4) wrong("four hexadecimal digits");
    at_ += 4;
    return code;
  }
  static void utf8(uint32_t code, std::string& out) {
    if (code < 0x80) return void(out += static_cast<char>(code));
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    out += static_cast<char>((more == 1 ? 0xc0 : more == 2 ? 0xe0 : 0xf0) | code >> (6 * more));
    for (int n = more - 1; n >= 0; --n) out += static_cast<char>(0x80 | (code >> (6 * n) & 0x3f));
  }

  void number(Json& out) {
    const char* const begin = text_.data() + at_;
    const char* const end = text_.data() + text_.size();
    if (begin == end || !(*begin == '-' || (*begin >= '0' && *begin <= '9'))) wrong("a value");
    const size_t sign = *begin == '-';
    if (text_.size() - at_ > sign + 1 && begin[sign] == '0' && begin[sign + 1] >= '0' && begin[sign + 1] <= '9') {
      wrong("a number without leading zeros");
    }
    const auto whole = std::from_chars(begin, end, out.integer);
    const auto any = std::from_chars(begin, end, out.real);
    if (any.ec != std::errc() || !std::isfinite(out.real)) wrong("a number");
    const bool integer = whole.ec == std::errc() && whole.ptr == any.ptr;
    out.kind = integer ? Json::Kind::integer : Json::Kind::real;
    at_ += static_cast<size_t>(any.ptr - begin);
  }

  std::string_view text_;
  const char* what_;
  size_t at_ = 0;
  int64_t values_ = 0;
};

void quote(const std::string& text, std::string& out) {
  out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      (out += '\\') += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
      out += code;
    } else {
      out += c;
    }
  }
  out += '"';
}

void write(const Json& value, std::string& out) {
  char digits[40];
  const char* separator = "";
  switch (value.kind) {
    case Json::Kind::null:
      out += "null";
      break;
    case Json::Kind::boolean:
      out += value.boolean ? "true" : "false";
      break;
    case Json::Kind::integer:
      out += std::to_string(value.integer);
      break;
    case Json::Kind::real:
      std::snprintf(digits, sizeof digits, "%.17g", value.real);
      out += digits;
      break;
    case Json::Kind::text:
      quote(value.text, out);
      break;
    case Json::Kind::list:
      out += '[';
      for (const Json& item : value.list) out += std::exchange(separator, ", "), write(item, out);
      out += ']';
      break;
    case Json::Kind::object:
      out += '{';
      for (size_t n = 0; n < value.names.size(); ++n) {
        out += std::exchange(separator, ", ");
        quote(value.names[n], out);
        out += ": ";
        write(value.list[n], out);
      }
      out += '}';
      break;
  }
}

}  // namespace

Json Json::parse(std::string_view text, const char* what) { return Parser(text, what).whole(); }

const Json* Json::find(std::string_view name) const {
  for (size_t n = 0; n < names.size(); ++n) {
    if (names[n] == name) return &list[n];
  }
  return nullptr;
}

const char* Json::kind_name() const {
  constexpr const char* kNames[] = {"null", "a boolean", "an integer", "a number", "a string", "a list", "an object"};
  return kNames[static_cast<int>(kind)];
}

std::string Json::dump() const {
  std::string out;
  write(*this, out);
  return out;
}

}  // namespace fastseq::deploy
