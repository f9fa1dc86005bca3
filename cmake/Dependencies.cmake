# Debian packages, and MLX from its PyPI wheel. docs/dependencies.md says why each.
find_package(Threads REQUIRED)
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(CRYPTO REQUIRED IMPORTED_TARGET libcrypto)
find_package(yaml-cpp REQUIRED)
find_package(CLI11 REQUIRED)

# MLX's C++ ABI is not stable: exactly this version.
set(METAL_LORA_MLX_VERSION 0.32.4)
if(NOT METAL_LORA_PYTHON)
  if(EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
    set(METAL_LORA_PYTHON ${CMAKE_SOURCE_DIR}/.venv/bin/python)
  else()
    set(METAL_LORA_PYTHON python3)
  endif()
endif()
# Found without importing it: MLX for CUDA loads only beside a driver.
execute_process(
  COMMAND ${METAL_LORA_PYTHON} -c
          "import importlib.util as u; print(list(u.find_spec('mlx').submodule_search_locations)[0])"
  OUTPUT_VARIABLE MLX_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
  RESULT_VARIABLE mlx_rc)
if(NOT mlx_rc EQUAL 0)
  message(FATAL_ERROR "MLX ${METAL_LORA_MLX_VERSION} is not installed for ${METAL_LORA_PYTHON}.\n"
                      "hint: run ./quickstart, or pip install 'mlx[cpu]==${METAL_LORA_MLX_VERSION}'"
                      " and pass -DMETAL_LORA_PYTHON=<that python>")
endif()
file(STRINGS ${MLX_ROOT}/include/mlx/version.h mlx_version_lines REGEX "define MLX_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" mlx_version_parts "${mlx_version_lines}")
string(REPLACE ";" "." mlx_version "${mlx_version_parts}")
if(NOT mlx_version STREQUAL METAL_LORA_MLX_VERSION)
  message(FATAL_ERROR "MLX must be ${METAL_LORA_MLX_VERSION} but ${MLX_ROOT} is ${mlx_version}")
endif()
# Its targets alone: MLXConfig.cmake of the CUDA wheel demands a CUDA toolkit and cuDNN's headers.
include(${MLX_ROOT}/share/cmake/MLX/MLXTargets.cmake)
# Its headers are not ours to warn about.
set_target_properties(mlx PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES
                      "$<TARGET_PROPERTY:mlx,INTERFACE_INCLUDE_DIRECTORIES>")
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  # libcuda.so.1 comes with the driver, which a machine that only builds need not have.
  target_link_options(mlx INTERFACE -Wl,--allow-shlib-undefined)
endif()
