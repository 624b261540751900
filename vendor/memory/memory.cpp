#include "memory.h"

#include "ggml-backend.h"
#include "llama-ext.h"

#include <vector>

size_t medusa_memory_of(const llama_context* context, medusa_memory* out, size_t n) {
    std::vector<medusa_memory> devices = {{}};  // the host
    for (const auto& [type, bytes] : llama_get_memory_breakdown(context)) {
        ggml_backend_dev_t device = nullptr;
        if (!ggml_backend_buft_is_host(type)) {
            device = ggml_backend_buft_get_device(type);
            // Repacked weights are memory of the host, too.
            if (device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU) {
                device = nullptr;
            }
        }
        size_t i = 0;
        while (i < devices.size() && devices[i].device != device) {
            i++;
        }
        if (i == devices.size()) {
            devices.push_back({device, 0, 0, 0});
        }
        devices[i].weights += bytes.model;
        devices[i].cache += bytes.context;
        devices[i].compute += bytes.compute;
    }
    for (size_t i = 0; i < devices.size() && i < n; i++) {
        out[i] = devices[i];
    }
    return devices.size();
}
