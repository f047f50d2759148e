# Warnings for a target, as errors unless QUEST_WARNINGS_AS_ERRORS is off.
function(quest_warnings target)
  set(warnings -Wall -Wextra -Wshadow)
  if(QUEST_WARNINGS_AS_ERRORS)
    list(APPEND warnings -Werror)
  endif()
  list(JOIN warnings "," joined)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:${warnings} -Wpedantic -Wconversion>
    $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${joined}>)
  if(QUEST_WARNINGS_AS_ERRORS)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings>)
  endif()
endfunction()
