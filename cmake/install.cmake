# SPDX-License-Identifier: Apache-2.0
# The C++ package: libquire.so, the headers, and find_package(quire).
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

add_library(quire SHARED)
target_link_libraries(quire PRIVATE quire_objects)
target_include_directories(quire INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
                                           $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>)
target_compile_features(quire INTERFACE cxx_std_20)
set_target_properties(quire PROPERTIES VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})

install(TARGETS quire EXPORT quireTargets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/quire DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT quireTargets NAMESPACE quire:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quire)
file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/quireConfig.cmake "include(\"\${CMAKE_CURRENT_LIST_DIR}/quireTargets.cmake\")\n")
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/quireConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/quireConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/quireConfigVersion.cmake
        DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/quire)
