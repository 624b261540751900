#include "nextn.h"

#include "llama-ext.h"

void medusa_nextn_keep(llama_context* context, bool outputs_only) {
    llama_set_embeddings_nextn(context, true, outputs_only);
}

const float* medusa_nextn_row(llama_context* context, int32_t row) {
    return llama_get_embeddings_nextn_ith(context, row);
}
