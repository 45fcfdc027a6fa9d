// The program around a trainer: options, training loop, evaluation, generation (program.cpp). main() of either trainer calls this and nothing else;
// it makes its trainer through make_trainer(). Returns the exit status: 0, 1 (the run diverged), 2 (usage), 3 (data, files).
#pragma once

int run_program(int argc, char** argv);
