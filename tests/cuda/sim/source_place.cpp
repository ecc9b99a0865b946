/* source_place.cpp: see source_place.h. addr2line (binutils) reads the debug information. */
#include "source_place.h"

#include <dlfcn.h>
#include <link.h>
#include <map>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unordered_map>

namespace cusim {
namespace {

struct Source {
    uintptr_t program_counter; // or 0, then `text` stands
    std::string text;          // empty: not asked for
};

std::vector<Source> sources;
std::unordered_map<uintptr_t, uint32_t> by_counter;
std::map<std::pair<const char *, int>, uint32_t> by_place;

/* The last two parts of a path are enough to find the file. */
std::string shortened(std::string path) {
    const size_t discriminator = path.find(" (");
    if (discriminator != std::string::npos) path.resize(discriminator);
    const size_t last = path.rfind('/');
    if (last == std::string::npos || last == 0) return path;
    const size_t before = path.rfind('/', last - 1);
    return before == std::string::npos ? path : path.substr(before + 1);
}

std::string look_up(uintptr_t program_counter) {
    char unknown[32];
    snprintf(unknown, sizeof unknown, "%#zx", (size_t)program_counter);
    Dl_info info;
    link_map *map;
    if (!dladdr1((void *)program_counter, &info, (void **)&map, RTLD_DL_LINKMAP)) return unknown;
    const char *file = map->l_name[0] ? map->l_name : "/proc/self/exe";
    char link[4096] = "";
    if (realpath(file, link)) file = link;
    char command[4200];
    snprintf(command, sizeof command, "addr2line -i -e '%s' %#zx 2>/dev/null", file,
             (size_t)(program_counter - map->l_addr));
    FILE *pipe = popen(command, "r");
    if (!pipe) return unknown;
    std::string text, before;
    char line[4200];
    while (fgets(line, sizeof line, pipe)) {
        line[strcspn(line, "\n")] = 0;
        const std::string place = shortened(line);
        if (line[0] == '?' || place == before) continue;
        text += text.empty() ? place : " in " + place;
        before = place;
    }
    pclose(pipe);
    return text.empty() ? unknown : text;
}

} // namespace

uint32_t source_of(uintptr_t program_counter) {
    const auto [found, is_new] = by_counter.try_emplace(program_counter, (uint32_t)sources.size());
    if (is_new) sources.push_back({program_counter, ""});
    return found->second;
}

uint32_t source_of(Place at) {
    const auto [found, is_new] =
        by_place.try_emplace(std::make_pair(at.file, at.line), (uint32_t)sources.size());
    if (is_new) sources.push_back({0, shortened(at.file) + ":" + std::to_string(at.line)});
    return found->second;
}

const std::string &source_text(uint32_t source) {
    Source &known = sources[source];
    if (known.text.empty()) known.text = look_up(known.program_counter);
    return known.text;
}

} // namespace cusim
