# metal_emulate(<target> SOURCES a.metal [b.metal …] [INCLUDE_DIRS dir …] [DEFINES NAME[=VALUE] …]
#               [KERNELS host_name …] [NO_LINT])
#
# Builds one library of emulated kernels per source: ${CMAKE_CURRENT_BINARY_DIR}/<target>/a.so. What
# the emulator does not understand, and what Apple's compiler would refuse, is a build error. The
# target's property METAL_EMULATE_LIBRARIES lists the libraries; metal_emulator::load() opens them.
function(metal_emulate target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "NO_LINT" "" "SOURCES;INCLUDE_DIRS;DEFINES;KERNELS")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "metal_emulate(${target}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT arg_SOURCES)
    message(FATAL_ERROR "metal_emulate(${target}): no SOURCES")
  endif()
  set(options "")
  foreach(dir IN LISTS arg_INCLUDE_DIRS)
    cmake_path(ABSOLUTE_PATH dir BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR})
    list(APPEND options -I ${dir})
  endforeach()
  foreach(define IN LISTS arg_DEFINES)
    list(APPEND options -D ${define})
  endforeach()
  foreach(kernel IN LISTS arg_KERNELS)
    list(APPEND options --kernel ${kernel})
  endforeach()
  if(arg_NO_LINT)
    list(APPEND options --no-lint)
  endif()
  # The emulator's own headers are part of every library.
  get_target_property(emulator_folder metal_emulator SOURCE_DIR)
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${emulator_folder}/shim/* ${emulator_folder}/lint_shim/*)
  set(libraries "")
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${CMAKE_CURRENT_SOURCE_DIR})
    cmake_path(GET source STEM name)
    set(library ${CMAKE_CURRENT_BINARY_DIR}/${target}/${name}.so)
    add_custom_command(
      OUTPUT ${library}
      COMMAND metal-emulate compile ${source} -o ${library} --depfile ${library}.d ${options}
      DEPENDS ${source} metal-emulate ${headers}
      DEPFILE ${library}.d
      COMMENT "Compiling ${name}.metal for the emulator"
      VERBATIM)
    list(APPEND libraries ${library})
  endforeach()
  add_custom_target(${target} ALL DEPENDS ${libraries})
  set_target_properties(${target} PROPERTIES METAL_EMULATE_LIBRARIES "${libraries}")
endfunction()
