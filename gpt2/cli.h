// Reading a command line by CLI11. What is wrong with it becomes an error of ours: one line, exit 2.
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "error.h"

// What could not be placed. CLI11's own message would list everything in reverse. commands: if `app` is to be given one.
inline void refuse_extras(const CLI::App& app, const std::string& name, const char* commands) {
    std::vector<std::string> extras = app.remaining();
    if (extras.empty()) return;
    bool option = extras[0][0] == '-';
    if (commands && !option) usage_error("unknown command '%s': choose %s", extras[0].c_str(), commands);
    usage_error("unknown %s '%s': %s --help lists what there is", option ? "option" : "argument", extras[0].c_str(), name.c_str());
}

// A program's name is that of `app`, and it has subcommands, of which one must be given; commands: their names. False if only help was asked for, which has
// then been printed.
inline bool parse_arguments(CLI::App& app, int argc, char** argv, const char* commands) {
    app.require_subcommand(0, 1)->allow_extras();
    for (CLI::App* command : app.get_subcommands(std::function<bool(CLI::App*)>())) command->allow_extras();
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& e) {
        if (e.get_exit_code() == 0) {
            app.exit(e);
            return false;
        }
        std::string line = e.what();
        std::replace(line.begin(), line.end(), '\n', ' ');
        bool no_value = e.get_name() == "ArgumentMismatch" && line.find(" missing") != std::string::npos;
        if (no_value) line = line.substr(0, line.find(':')) + " needs a value";
        std::string name = app.get_name();
        for (const CLI::App* command : app.get_subcommands()) name += " " + command->get_name();
        usage_error("%s; %s --help lists what there is", line.c_str(), name.c_str());
    }
    refuse_extras(app, app.get_name(), commands);
    if (app.get_subcommands().empty()) usage_error("no command: give %s; %s COMMAND --help lists its options", commands, app.get_name().c_str());
    const CLI::App& command = *app.get_subcommands()[0];
    refuse_extras(command, app.get_name() + " " + command.get_name(), nullptr);
    return true;
}
