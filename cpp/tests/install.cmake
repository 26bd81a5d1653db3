# Installs a build, moves the installation, and uses it from there as another project would.
# cpp/tests/CMakeLists.txt passes the variables in capitals.
cmake_minimum_required(VERSION 3.24)

set(prefix "${WORK_DIR}/moved")
set(package "${prefix}/${PACKAGE_DIR}")
file(REMOVE_RECURSE "${WORK_DIR}")
execute_process(
  COMMAND "${CMAKE_COMMAND}" --install "${BUILD_DIR}" --config "${CONFIG}"
          --prefix "${WORK_DIR}/installed"
  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
# From here on, a path into the first folder does not exist.
file(RENAME "${WORK_DIR}/installed" "${prefix}")

# ---- installed files name only installed files -------------------------------------------------
file(GLOB_RECURSE headers RELATIVE "${prefix}/${INCLUDE_DIR}" "${prefix}/${INCLUDE_DIR}/*")
foreach(header IN LISTS headers)
  file(STRINGS "${prefix}/${INCLUDE_DIR}/${header}" lines REGEX "#include \"")
  foreach(line IN LISTS lines)
    if(NOT line MATCHES "\"(.*)\"" OR NOT CMAKE_MATCH_1 IN_LIST headers)
      message(FATAL_ERROR "${header}: expected only installed headers (${headers}), got ${line}")
    endif()
  endforeach()
endforeach()

file(GLOB package_files "${package}/*.cmake")
foreach(file IN LISTS package_files)
  file(READ "${file}" text)
  foreach(ours IN ITEMS "${SOURCE_DIR}" "${BUILD_DIR}" INTERFACE_COMPILE_OPTIONS
                        INTERFACE_COMPILE_DEFINITIONS INTERFACE_LINK_OPTIONS)
    string(FIND "${text}" "${ours}" at)
    if(NOT at EQUAL -1)
      message(FATAL_ERROR "${file}: expected neither paths nor flags of this build, got ${ours}")
    endif()
  endforeach()
endforeach()

# ---- requests that must fail -----------------------------------------------------------------
function(expect_not_found reason)
  find_package(rosa ${ARGN} QUIET PATHS "${package}" NO_DEFAULT_PATH)
  # CMake itself refuses a version. Its message names only the versions that it saw.
  set(got "${rosa_NOT_FOUND_MESSAGE} (versions seen: ${rosa_CONSIDERED_VERSIONS})")
  if(rosa_FOUND OR NOT got MATCHES "${reason}")
    list(JOIN ARGN " " request)
    message(FATAL_ERROR "find_package(rosa ${request}): expected \"${reason}\", "
                        "got rosa_FOUND=${rosa_FOUND} ${got}")
  endif()
endfunction()
expect_not_found("got gpu" COMPONENTS cpu gpu)
expect_not_found("seen: ${VERSION}" 99)
expect_not_found("seen: ${VERSION}" 0.0)  # an older version may have another interface
if(NOT HAS_CUDA)
  expect_not_found("built without CUDA" COMPONENTS cuda)
endif()

# ---- the example -----------------------------------------------------------------------------
set(options "-DCMAKE_PREFIX_PATH=${prefix}" "-DCMAKE_BUILD_TYPE=${CONFIG}"
            "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}")
set(programs on_cpu)
if(HAS_CUDA)
  list(APPEND options "-DCUDAToolkit_ROOT=${CUDA_ROOT}")
  list(APPEND programs on_cuda)
endif()
execute_process(
  COMMAND
    "${CMAKE_CTEST_COMMAND}" --build-config "${CONFIG}"
    --build-and-test "${SOURCE_DIR}/cpp/example" "${WORK_DIR}/example"
    --build-generator "${GENERATOR}" --build-makeprogram "${MAKE_PROGRAM}"
    --build-options ${options}
    --test-command "${CMAKE_CTEST_COMMAND}" --build-config "${CONFIG}" --verbose
  OUTPUT_VARIABLE output
  ECHO_OUTPUT_VARIABLE COMMAND_ERROR_IS_FATAL ANY)
foreach(program IN LISTS programs)
  if(NOT output MATCHES "${program}: ")
    message(FATAL_ERROR "expected the example to run ${programs}, got no line of ${program}")
  endif()
endforeach()
