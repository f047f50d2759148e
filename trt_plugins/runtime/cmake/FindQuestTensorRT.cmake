# Finds TensorRT, or TensorRT for RTX where QUEST_DEPLOY_TENSORRT_RTX is on, as the target quest_deploy::tensorrt.
#
# TENSORRT_ROOT, or TENSORRT_INCLUDE_DIR and TENSORRT_LIBRARY, say where it is. Its headers alone are enough to compile against: the
# target is there as soon as they are found, QuestTensorRT_LIBRARY_FOUND only with the library too.
if(QUEST_DEPLOY_TENSORRT_RTX)
    set(_quest_library tensorrt_rtx)
else()
    set(_quest_library nvinfer)
endif()
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES include)
find_library(TENSORRT_LIBRARY ${_quest_library} HINTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(QuestTensorRT REQUIRED_VARS TENSORRT_INCLUDE_DIR)
set(QuestTensorRT_LIBRARY_FOUND ${QuestTensorRT_FOUND})
if(NOT TENSORRT_LIBRARY)
    set(QuestTensorRT_LIBRARY_FOUND FALSE)
endif()
if(QuestTensorRT_FOUND AND NOT TARGET quest_deploy::tensorrt)
    add_library(quest_deploy::tensorrt INTERFACE IMPORTED)
    set_target_properties(quest_deploy::tensorrt PROPERTIES INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "${TENSORRT_INCLUDE_DIR}"
        INTERFACE_INCLUDE_DIRECTORIES "${TENSORRT_INCLUDE_DIR}")
    if(TENSORRT_LIBRARY)
        set_target_properties(quest_deploy::tensorrt PROPERTIES INTERFACE_LINK_LIBRARIES "${TENSORRT_LIBRARY}")
    endif()
endif()
