// Classifies pictures with a bundle's model.pte:  classify BUNDLE PICTURE...
//
// Pictures are binary PGM (grey) or PPM (colour) files of the size that the bundle asks for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
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

// The numbers of a flat list in preprocessing.json. An app has a JSON library for this.
std::vector<float> numbers(const std::string& json, const std::string& key) {
  const auto start = json.find('[', json.find("\"" + key + "\":")) + 1;
  std::string list = json.substr(start, json.find(']', start) - start);
  std::replace(list.begin(), list.end(), ',', ' ');
  std::istringstream words(list);
  return {std::istream_iterator<float>(words), {}};
}

struct Picture {
  int height, width, channels;
  std::vector<uint8_t> pixels; // height, width, channels
};

Picture read_picture(const std::string& path) {
  std::istringstream file(read(path));
  std::string kind;
  int width = 0, height = 0, largest = 0;
  file >> kind >> width >> height >> largest;
  file.get(); // the one blank before the pixels
  if ((kind != "P5" && kind != "P6") || largest != 255)
    throw std::runtime_error(path + " is no binary PGM or PPM file of 8 bits");
  Picture picture{height, width, kind == "P5" ? 1 : 3, {}};
  picture.pixels.assign(std::istreambuf_iterator<char>(file), {});
  if (picture.pixels.size() != size_t(height) * width * picture.channels)
    throw std::runtime_error(path + " is cut short");
  return picture;
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
  const bool inside = form.find("\"inside_the_graph\": true") != std::string::npos;
  std::vector<std::string> labels;
  std::istringstream lines(read(bundle + "/labels.txt"));
  for (std::string line; std::getline(lines, line);) labels.push_back(line);

  Module module(bundle + "/model.pte");
  for (int which = 2; which < argc; ++which) {
    Picture picture = read_picture(argv[which]);
    if (picture.channels != int(mean.size()))
      throw std::runtime_error(std::string(argv[which]) + " has other channels than the bundle");
    const int h = picture.height, w = picture.width, c = picture.channels;
    std::vector<float> values = normalised(picture, mean, std);
    auto input = inside ? from_blob(picture.pixels.data(), {1, h, w, c}, ScalarType::Byte)
                        : from_blob(values.data(), {1, c, h, w});
    const auto result = module.forward(input);
    if (!result.ok()) throw std::runtime_error(std::string(argv[which]) + " is not what it takes");
    const auto output = result->at(0).toTensor();
    std::vector<float> scores(
        output.const_data_ptr<float>(), output.const_data_ptr<float>() + output.numel());
    if (!inside) softmax(scores);
    const size_t best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    std::cout << labels.at(best) << '\t' << scores[best] << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << '\n';
  return 1;
}
