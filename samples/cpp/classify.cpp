// Classifies images with a bundle's model.pte:  classify BUNDLE PICTURE...
//
// Images are binary PGM (grey) or PPM (colour) files of any size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + " cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// A flat list of numbers in preprocessing.json. In an app, use a JSON library.
std::vector<float> numbers(const std::string& json, const std::string& key) {
  const auto start = json.find('[', json.find("\"" + key + "\":")) + 1;
  std::string list = json.substr(start, json.find(']', start) - start);
  std::replace(list.begin(), list.end(), ',', ' ');
  std::istringstream words(list);
  return {std::istream_iterator<float>(words), {}};
}

int number(const std::string& json, const std::string& key) {
  return std::stoi(json.substr(json.find(':', json.find("\"" + key + "\":")) + 1));
}

struct Picture {
  int height, width, channels;
  std::vector<uint8_t> pixels; // in height, width, channel order
};

Picture read_picture(const std::string& path) {
  std::istringstream file(read(path));
  std::string kind;
  int width = 0, height = 0, largest = 0;
  file >> kind >> width >> height >> largest;
  file.get(); // the single whitespace before the pixels
  if ((kind != "P5" && kind != "P6") || largest != 255)
    throw std::runtime_error(path + " is no binary PGM or PPM file of 8 bits");
  Picture picture{height, width, kind == "P5" ? 1 : 3, {}};
  picture.pixels.assign(std::istreambuf_iterator<char>(file), {});
  if (picture.pixels.size() != size_t(height) * width * picture.channels)
    throw std::runtime_error(path + " is cut short");
  return picture;
}

// The input pixels of one output pixel, starting at `from`, and their weights in 2^-22.
struct Tap {
  int from;
  std::vector<int> weights;
  template <typename Value> uint8_t sum(Value value) const {
    int sum = 1 << 21, at = from;
    for (const int weight : weights) sum += weight * value(at++);
    return uint8_t(std::clamp(sum >> 22, 0, 255));
  }
};

std::vector<Tap> taps(int length, int square, int side) {
  const double scale = double(square) / side, reach = std::max(scale, 1.0);
  std::vector<Tap> made;
  for (int at = 0; at < side; ++at) {
    const double centre = (length - square) / 2.0 + (at + 0.5) * scale;
    const int from = std::max(0, int(centre - reach + 0.5));
    const int to = std::min(length, int(centre + reach + 0.5));
    std::vector<double> shares;
    for (int pixel = from; pixel < to; ++pixel)
      shares.push_back(std::max(0.0, 1 - std::abs((pixel - centre + 0.5) / reach)));
    const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
    made.push_back({from, {}});
    for (const double share : shares)
      made.back().weights.push_back(int(0.5 + share / sum * (1 << 22)));
  }
  return made;
}

// Converts colour to grey by luminance, or repeats grey in three channels.
Picture coloured(const Picture& picture, int channels) {
  if (picture.channels == channels) return picture;
  Picture made{picture.height, picture.width, channels, {}};
  for (size_t at = 0; at < picture.pixels.size(); at += picture.channels) {
    const uint8_t* pixel = &picture.pixels[at];
    if (channels == 1)
      made.pixels.push_back((19595 * pixel[0] + 38470 * pixel[1] + 7471 * pixel[2] + 0x8000) >> 16);
    else
      made.pixels.insert(made.pixels.end(), 3, *pixel);
  }
  return made;
}

// The centre square, resized by an antialiased triangle filter. Each byte is within 1 of
// classify.py's.
Picture fitted(const Picture& picture, int side) {
  const int square = std::min(picture.width, picture.height), channels = picture.channels;
  const auto across = taps(picture.width, square, side), down = taps(picture.height, square, side);
  std::vector<uint8_t> narrow;
  for (int y = 0; y < picture.height; ++y)
    for (const Tap& tap : across)
      for (int channel = 0; channel < channels; ++channel)
        narrow.push_back(tap.sum([&](int x) {
          return picture.pixels[(size_t(y) * picture.width + x) * channels + channel];
        }));
  Picture made{side, side, channels, {}};
  for (const Tap& tap : down)
    for (int at = 0; at < side * channels; ++at)
      made.pixels.push_back(
          tap.sum([&](int y) { return narrow[size_t(y) * side * channels + at]; }));
  return made;
}

// (pixel / 255 - mean) / std, channels first.
std::vector<float> normalised(
    const Picture& picture, const std::vector<float>& mean, const std::vector<float>& std) {
  const int area = picture.height * picture.width, channels = picture.channels;
  std::vector<float> values(picture.pixels.size());
  for (int channel = 0; channel < channels; ++channel)
    for (int at = 0; at < area; ++at)
      values[channel * area + at] =
          (picture.pixels[at * channels + channel] / 255.0f - mean[channel]) / std[channel];
  return values;
}

void softmax(std::vector<float>& scores) {
  const float largest = *std::max_element(scores.begin(), scores.end());
  float sum = 0;
  for (float& score : scores) sum += score = std::exp(score - largest);
  for (float& score : scores) score /= sum;
}

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: classify BUNDLE PICTURE...");
  const std::string bundle = argv[1], form = read(bundle + "/preprocessing.json");
  const auto mean = numbers(form, "mean"), std = numbers(form, "std");
  const int side = number(form, "height");
  const bool inside = form.find("\"inside_the_graph\": true") != std::string::npos;
  std::vector<std::string> labels;
  std::istringstream lines(read(bundle + "/labels.txt"));
  for (std::string line; std::getline(lines, line);) labels.push_back(line);

  Module module(bundle + "/model.pte");
  for (int which = 2; which < argc; ++which) {
    Picture picture = fitted(coloured(read_picture(argv[which]), int(mean.size())), side);
    const int h = picture.height, w = picture.width, c = picture.channels;
    std::vector<float> values = normalised(picture, mean, std);
    auto input = inside ? from_blob(picture.pixels.data(), {1, h, w, c}, ScalarType::Byte)
                        : from_blob(values.data(), {1, c, h, w});
    const auto result = module.forward(input);
    if (!result.ok()) throw std::runtime_error(std::string(argv[which]) + " is not what it takes");
    const auto output = result->at(0).toTensor();
    std::vector<float> scores(
        output.const_data_ptr<float>(), output.const_data_ptr<float>() + output.numel());
    if (labels.size() != scores.size()) throw std::runtime_error("labels.txt belongs to another file");
    if (!inside) softmax(scores);
    const size_t best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    std::cout << labels.at(best) << '\t' << scores[best] << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
