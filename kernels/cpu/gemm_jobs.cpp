// Copyright © 2026 The MetalLoRA authors.
// SPDX-License-Identifier: MIT
#include "kernels/cpu/gemm_jobs.h"

#include "kernels/cpu/thread_pool.h"

namespace metal_lora::cpu {

void run_jobs(const GemmKernels& kernels, std::span<GemmJob> jobs) {
  struct PanelAt {
    size_t job;
    uint32_t panel;
  };
  std::vector<PanelAt> panels;
  size_t words = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    PackedRows& a = jobs[j].product.a;
    a.rows = RowPanels(jobs[j].rows, kernels.max_rows);
    a.panel_steps = steps_of(kernels.compute, jobs[j].k);
    words += size_t{a.rows.count} * a.rows.height * a.panel_steps;
    for (uint32_t p = 0; p < a.rows.count; ++p) panels.push_back({j, p});
  }
  auto* out = static_cast<uint32_t*>(thread_scratch().panels.bytes(words * 4 + 4));
  for (GemmJob& job : jobs) {
    PackedRows& a = job.product.a;
    a.data = out;
    out += size_t{a.rows.count} * a.rows.height * a.panel_steps;
  }
  parallel_for(panels.size(), [&](size_t i) {
    const GemmJob& job = jobs[panels[i].job];
    pack_row_panel(kernels, job.left, job.transposed, 0, job.k, job.product.a, 0, panels[i].panel);
  });
  std::vector<Product> products;
  for (const GemmJob& job : jobs) products.push_back(job.product);
  run_products(kernels, products);
}

}  // namespace metal_lora::cpu
