# METAL_LORA_CUDA: whether this build has CUDA kernels. They need nvcc (CUDA 12.8 or later), at build
# time only; programs built with them run on machines without a GPU, too.
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # Where the machine has none: PyPI's nvidia-cuda-nvcc (scripts/requirements-cuda.txt).
  find_program(METAL_LORA_NVCC nvcc HINTS /usr/local/cuda/bin ${MLX_ROOT}/../nvidia/cu13/bin)
  if(METAL_LORA_NVCC)
    set(CMAKE_CUDA_COMPILER ${METAL_LORA_NVCC})
    # PyPI's has its libraries in lib, where it does not look for them itself.
    get_filename_component(cuda_root ${METAL_LORA_NVCC}/../.. ABSOLUTE)
    if(EXISTS ${cuda_root}/lib/libcudart_static.a AND NOT EXISTS ${cuda_root}/lib64)
      set(ENV{NVCC_APPEND_FLAGS} "$ENV{NVCC_APPEND_FLAGS} -L${cuda_root}/lib")
      link_directories(${cuda_root}/lib)
    endif()
  endif()
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(cuda_here ON)
else()
  set(cuda_here OFF)
endif()
option(METAL_LORA_CUDA "Build the CUDA kernels (nvcc)" ${cuda_here})
set(METAL_LORA_CUDA_ARCHS "80-real;90-real;90-virtual" CACHE STRING
    "GPU architectures of the CUDA kernels; 90-real alone builds fastest")

if(METAL_LORA_CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "METAL_LORA_CUDA needs nvcc, and CMake finds none.\n"
      "hint: scripts/setup --cuda installs PyPI's; or install NVIDIA's cuda-nvcc package, or pass"
      " -DCMAKE_CUDA_COMPILER=<path of nvcc>")
  endif()
  set(CMAKE_CUDA_ARCHITECTURES ${METAL_LORA_CUDA_ARCHS})
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
  if(NOT CMAKE_CUDA_COMPILER_LAUNCHER AND CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    message(FATAL_ERROR "The CUDA kernels need nvcc 12.8 or later, but ${CMAKE_CUDA_COMPILER} is"
      " ${CMAKE_CUDA_COMPILER_VERSION}.\nhint: scripts/setup --cuda installs one; or pass"
      " -DCMAKE_CUDA_COMPILER=<path of nvcc>, or -DMETAL_LORA_CUDA=OFF for the CPU alone")
  endif()
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake before 3.26 does not know that nvcc has it
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  # Not CMake's FindCUDAToolkit: it asks for the shared runtime, which PyPI's packages name otherwise.
  find_library(METAL_LORA_CUDART cudart_static HINTS ${CMAKE_CUDA_COMPILER_LIBRARY_ROOT}
               PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib lib/x86_64-linux-gnu REQUIRED)
  add_library(metal_lora_cudart INTERFACE)
  target_include_directories(metal_lora_cudart SYSTEM
                             INTERFACE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_link_libraries(metal_lora_cudart INTERFACE ${METAL_LORA_CUDART} Threads::Threads dl rt)
endif()
