// The lower half of llama.cpp's `common/chat`: JSON, JSON schemas, grammars, Jinja. One translation
// unit, as is chat.cpp with the upper half: file by file, the compiler takes three times as long.

#include "inside.h"

#include "common/json.cpp"

#include "common/jinja/runtime.h"
#undef assert
#define assert GGML_ASSERT
#include "common/jinja/value.cpp"
#include "common/jinja/string.cpp"
#include "common/jinja/lexer.cpp"
#include "common/jinja/parser.cpp"
#include "common/jinja/runtime.cpp"
#include "common/jinja/caps.cpp"

#include "common/json-schema.cpp"
#include "common/json-schema-to-grammar.cpp"
#include "common/trie.cpp"
#include "common/unicode.cpp"
